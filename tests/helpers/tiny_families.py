"""A tiny random model of every mixture-of-experts family that the installed transformers has."""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

MARK = "use_experts_implementation"
VOCABULARY, EXPERTS, TOP_K, LAYERS, WIDTH = 64, 8, 2, 4, 32

# Every configuration takes the names that it knows; what a family needs beside them stands below.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "use_cache": True,
    "router_jitter_noise": 0.01,
}
LINEAR_ATTENTION: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
LATENT_ATTENTION: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}
PARTICULAR: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**LATENT_ATTENTION, "layer_types": ["linear_attention", "full_attention"] * 2},
    "axk1": LATENT_ATTENTION,
    "axk2": LATENT_ATTENTION,
    "deepseek_v2": {**LATENT_ATTENTION, "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT_ATTENTION,
    "deepseek_v32": LATENT_ATTENTION,
    "dots1": {"num_key_value_heads": 4, "n_shared_experts": 1},
    "dots3_note": LATENT_ATTENTION,
    "gemma4": {
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "glm4_moe_lite": LATENT_ATTENTION,
    "glm_moe_dsa": LATENT_ATTENTION,
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": {**LINEAR_ATTENTION, **LATENT_ATTENTION, "num_expert_group": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mistral4": {**LATENT_ATTENTION, "head_dim": 16},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "use_mamba_kernels": False,
    },
    "qwen3_5_moe": LINEAR_ATTENTION,
    "qwen3_next": LINEAR_ATTENTION,
    "qwen4_exp": {
        **LINEAR_ATTENTION,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


@cache
def families() -> dict[str, type[PreTrainedModel]]:
    """Returns the causal language model of each family whose file follows the experts protocol."""
    found: dict[str, type[PreTrainedModel]] = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if MARK not in file.read_text(encoding="utf-8"):
            continue
        name = f"transformers.models.{file.parent.name}.{file.stem}"
        module = importlib.import_module(name)
        for class_name, kind in inspect.getmembers(module, inspect.isclass):
            if class_name.endswith("ForCausalLM") and kind.__module__ == name:
                found[file.parent.name] = kind
    return found


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Returns a configuration of a few kilobytes.

    Args:
        family: Name of the folder in transformers.
        changes: Options that replace those of the table where the family knows them.
    """
    kind: Any = families()[family].config_class
    known = set(inspect.signature(kind.__init__).parameters)
    known |= {name for parent in kind.__mro__ for name in vars(parent).get("__annotations__", {})}
    options = {**COMMON, **PARTICULAR.get(family, {}), **changes}
    return kind(**{name: value for name, value in options.items() if name in known})


def tiny_model(family: str, **changes: Any) -> Any:
    """Returns a random model in evaluation mode, always the same."""
    torch.manual_seed(0)
    model = families()[family](tiny_config(family, **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # Selection biases start at zero, where a test would not notice that they are forgotten.
        if "bias" in name and tensor.is_floating_point() and tensor.numel() == EXPERTS:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * 0.1)
    return model
