"""GGUF files of tiny models, written by the `gguf` package as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "r e", "re d", "i s", "b l", "u e", "bl ue")
WORDS = [*CONTROL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
END = CONTROL.index("<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
# The width of experts is not among what transformers reads of a file: its default.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True}
PACKED = "ffn_down"
"""Tensors whose names hold this are in 8 bits, as a published file's are in few."""


def tiny_llama() -> LlamaForCausalLM:
    """Returns a dense model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()


def tiny_qwen3_moe() -> Qwen3MoeForCausalLM:
    """Returns a model with experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, tie_word_embeddings=True)).eval()


def write_gguf(model: PreTrainedModel, file: Path) -> None:
    """Writes a model and the tokenizer of `WORDS` into a file; sets packed weights to what their 8 bits say."""
    kind = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}[model.config.model_type]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[kind])
    _write_facts(writer, model)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    for name, tensor in model.named_parameters():
        path, _, suffix = name.rpartition(".")
        if path.endswith("experts"):  # of transformers: gate and up in one
            parts = ("gate", "up") if suffix == "gate_up_proj" else ("down",)
            for part, weight in zip(parts, tensor.chunk(len(parts), dim=1), strict=True):
                _write(writer, f"blk.{path.split('.')[2]}.ffn_{part}_exps.weight", weight)
        else:
            _write(writer, f"{names.get_name(path)}.{suffix}", tensor, model.config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write(writer: gguf.GGUFWriter, name: str, weight: Tensor, config: LlamaConfig | None = None) -> None:
    if PACKED in name:
        packed = gguf.quantize(weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        values = torch.tensor(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
        weight.detach().copy_(values.reshape(weight.shape))
        return
    values = weight.detach().numpy()
    if config is not None and config.model_type == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        # llama.cpp turns pairs that lie side by side, transformers the two halves of a head.
        heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
        values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    writer.add_tensor(name, np.ascontiguousarray(values))


def _write_facts(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3 if word in CONTROL else 1 for word in WORDS])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(CONTROL.index("<|im_start|>"))
    writer.add_eos_token_id(END)
    writer.add_pad_token_id(END)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
