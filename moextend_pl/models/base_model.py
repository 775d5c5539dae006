"""A base: whether the options of its language model fit together, how it is read, and what it predicts."""

from __future__ import annotations

import difflib
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moextend_pl.contracts import HostFacts, UserError
from moextend_pl.models.model_folder import is_quantised, read_config, read_model
from moextend_pl.moe import dispatch
from moextend_pl.moe.extension.extended_experts import ExtendedExperts
from moextend_pl.moe.kernels.norms import check_liger
from moextend_pl.moe.quantize import KINDS, NF4Config, check_packed
from moextend_pl.runs.fingerprints import check_weights
from moextend_pl.training.sharding.reading import Share, ShareConfig

# What is to be imported for each.
FLASH_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn",
}
# Keys that transformers reads although its configurations do not have them, or no longer.
FORMER_KEYS = ("model_type", "rope_theta", "partial_rotary_factor", "attn_implementation", "head_dim")


@dataclass(frozen=True)
class ComputeSpec:
    """How a language model computes, and in how many bits it holds what is frozen.

    Attributes:
        experts_implementation: `moextend`, for frozen experts: on a CPU the numbers of `grouped_mm`, on a GPU Triton
            kernels where experts are plain gated ones in 16 bits; `moextend_triton` takes the kernels in 32 bits
            too; or one of transformers.
        quantize: `nf4` holds the base's experts and Linear layers in 4 bits, frozen; None as they are.
        activation_checkpointing: Whether layers compute their activations again in the backward pass.
        attn_implementation: How attention is computed, as transformers names it; None for its default, `sdpa`. Flash
            attention needs its package and takes no packed rows; `flex_attention` learns on a GPU alone.
        compile: Whether decoder layers are compiled, each as one graph; worth its minutes on a GPU.
        liger: Whether RMSNorm is a kernel of liger-kernel on a GPU (extra `gpu`); for layers that are not compiled.
    """

    experts_implementation: str = dispatch.FROZEN_EXPERTS
    quantize: str | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    attn_implementation: str | None = None
    liger: bool = False


def check_options(base: str | dict[str, Any], tokenizer: str | None, compute: ComputeSpec, upcycled: bool) -> None:
    """Refuses options of a language model that do not fit together, before anything is read.

    Args:
        base: Folder of the base, or the configuration of a new model.
        tokenizer: Folder of the tokenizer.
        compute: How it is to compute.
        upcycled: Whether MLPs become experts.

    Raises:
        UserError: If a new model lacks what it needs, the folder holds none, or `compute` is not possible.
    """
    if isinstance(base, dict):
        if tokenizer is None:
            raise UserError(
                "Expected `tokenizer` for a model whose `base` is a configuration, got none. Name its folder."
            )
        if "model_type" not in base:
            raise UserError(f"Expected `model_type` in `language.base`, for example mixtral, got {sorted(base)}.")
    check_base(None if isinstance(base, dict) else base, compute.quantize, upcycled)
    check_implementation(compute.experts_implementation)
    check_attention(compute.attn_implementation)
    check_liger(compute.liger, compute.compile)


def check_base(base: str | None, quantize: str | None, upcycled: bool = False) -> None:
    """Refuses a base that is not there or cannot be quantised as asked, before anything is read.

    Args:
        base: Folder of the base; None for a new model.
        quantize: `nf4`, or None for a base as it is.
        upcycled: Whether its MLPs become experts.

    Raises:
        UserError: If the folder holds no model or a damaged configuration, the kind is unknown, bitsandbytes is not
            installed, there is no base to quantise, it is quantised already, or its MLPs become experts.
    """
    if base is not None and not (Path(base) / "config.json").is_file():
        raise UserError(f"Expected a transformers model in {base}, found no config.json. Run the stage that makes it.")
    if base is not None:
        read_config(base)
    if quantize is None:
        return
    if base is None:
        raise UserError("`quantize` is for a frozen `base`, got the configuration of a new model. Remove `quantize`.")
    if upcycled:
        raise UserError(
            "Expected `quantize` or an upcycled language model, got both: upcycled experts learn, 4-bit weights do "
            "not. Remove one of the two."
        )
    if quantize not in KINDS:
        raise UserError(f"Expected `quantize` null or one of {list(KINDS)}, got {quantize!r}.")
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"`quantize: {quantize}` needs the package bitsandbytes, which is not installed: "
            'pip install "bitsandbytes>=0.50", or remove `quantize`.'
        )
    if is_quantised(base):
        raise UserError(
            f"{base} is quantised already (its config.json has `quantization_config`); expected 16- or 32-bit weights "
            "for `quantize`. Name an unquantised base."
        )


def load_base(
    base: str, quantize: str | None = None, dense: bool = False, share: Share | None = None
) -> PreTrainedModel:
    """Loads a language model, as it is or with packed experts and Linear layers.

    Args:
        base: Folder of a transformers model.
        quantize: `nf4` packs; None does not.
        dense: Whether the model is meant to have no experts; else to find none to pack is an error.
        share: Which part of it this process is to hold; None for all.

    Returns:
        The model; what is not packed is of the default type, which the precision of the run sets.

    Raises:
        UserError: If the files are damaged or lack weights, or a weight does not pack.
    """
    check_weights(Path(base))
    options: dict[str, Any] = {} if quantize is None else {"quantization_config": NF4Config(dense)}
    if share is not None:
        options["quantization_config"] = ShareConfig(share)
    model = read_model(AutoModelForCausalLM, base, dtype=torch.get_default_dtype(), **options)
    if quantize is not None:
        check_packed(model, dense)
    return model


def compile_layers(model: PreTrainedModel, compute: ComputeSpec) -> None:
    """Compiles every decoder layer at its first use where that is asked for, in place; names of tensors stay.

    Layers that are built alike share a graph, whatever their number. A graph has no break, so that a layer that asks
    the device for a value is an error and no silent wait.

    Args:
        model: Grown as it will be used.
        compute: Whether to compile.
    """
    for module in model.modules() if compute.compile else ():
        if isinstance(module, ExtendedExperts):
            module.new._is_expert_parallel = True  # as a first compiled pass would leave it, for a second graph
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(fullgraph=True)


def check_implementation(name: str) -> None:
    """Refuses a way to compute experts that transformers does not know.

    Raises:
        UserError: If there is no such way.
    """
    known = dispatch.implementations()
    if name not in known:
        raise UserError(f"Expected `experts_implementation` to be one of {known}, got {name!r}.")


def check_attention(name: str | None) -> None:
    """Refuses a way to compute attention that transformers does not know or that is not installed.

    Args:
        name: Its name; None for the default.

    Raises:
        UserError: If there is no such way.
    """
    known = sorted({"eager", *(each for each in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in each)})
    if name is not None and name not in known:
        raise UserError(f"Expected `attn_implementation` null or one of {known}, got {name!r}.")
    package = FLASH_PACKAGES.get(name or "")
    if package is not None and find_spec(package) is None:
        raise UserError(
            f"`attn_implementation: {name}` needs the package {package}, which is not installed. Install it, or remove "
            "the line for `sdpa`."
        )


def set_attention(model: PreTrainedModel, name: str | None) -> None:
    """Sets how a model computes attention.

    Args:
        model: A transformers model.
        name: Known to `check_attention`; None changes nothing.

    Raises:
        UserError: If the family does not have it.
    """
    try:
        if name is not None:
            model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{type(model).__name__} cannot compute attention as {name!r}: {' '.join(str(error).split())} Remove "
            "`attn_implementation`."
        ) from error


def new_config(config: dict[str, Any], words: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Returns the configuration of a new model with the ids of its tokenizer.

    Args:
        config: Values, `model_type` among them.
        words: The tokenizer.

    Raises:
        UserError: If transformers has no such model, or does not accept a key or a value of it.
    """
    _refuse_unknown(config)
    ids = {name: getattr(words, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    try:
        made = AutoConfig.for_model(**{"vocab_size": len(words), **ids, **config})
    except Exception as error:  # whatever checks the fields of a configuration has exceptions of its own
        raise UserError(f"`language.base`: {' '.join(str(error).split())}. Correct it.") from error
    experts, chosen = (getattr(made, name, None) for name in ("num_experts", "num_experts_per_tok"))
    if isinstance(experts, int) and isinstance(chosen, int) and not 1 <= chosen <= experts:
        raise UserError(f"Expected `num_experts_per_tok` of `language.base` in 1..{experts}, got {chosen}.")
    return made


def _refuse_unknown(config: dict[str, Any]) -> None:
    """Refuses what transformers would keep without a word: a misspelt key leaves the default in its place."""
    kind = str(config["model_type"])
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(kind, list(CONFIG_MAPPING), n=1)
        hint = f"did you mean '{close[0]}'?" if close else "name a model of transformers, for example mixtral."
        raise UserError(f"`language.base`: transformers has no model type '{kind}'; {hint}")
    default = CONFIG_MAPPING[kind]()
    known = {*vars(default), *default.attribute_map, *(getattr(default, "rope_parameters", None) or {}), *FORMER_KEYS}
    for key in config:
        if key not in known and not hasattr(default, key):
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ". Leave it out."
            raise UserError(f"`language.base`: the model type '{kind}' does not know '{key}'{hint}")


def logits_of(model: PreTrainedModel, inputs: dict[str, Any], known: HostFacts | None) -> Tensor:
    """Predicts the next token, with the head applied to chosen positions only.

    Args:
        model: A causal language model.
        inputs: Its arguments.
        known: Which positions to predict from; None for all.

    Returns:
        (B, S, V) logits, or (A, V) at the A chosen positions.
    """
    head: Any = model.get_output_embeddings()
    # By index and not by `logits_to_keep`, which waits for a GPU or keeps all hidden states for the backward pass.
    hook = (
        nullcontext()
        if known is None
        else head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1).index_select(0, known.learned),))
    )
    with hook:
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits
