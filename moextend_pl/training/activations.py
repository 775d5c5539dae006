"""Activation checkpointing of a language model of which a part is frozen, and of vision towers."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moextend_pl.contracts import UserError

_NOT_REENTRANT = {"use_reentrant": False}


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Lets every decoder layer keep its input only and compute the rest again in the backward pass.

    Not the reentrant kind, which gives no gradient where the embeddings are frozen. transformers makes
    the embeddings' output need a gradient all the same; that is taken back, as it would lead the backward
    pass through all layers below the first one that learns.

    Args:
        model: A transformers model.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=_NOT_REENTRANT)
    else:  # its name in older releases
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=_NOT_REENTRANT)
    if hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()


def tower_blocks(tower: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a vision transformer that can compute their activations again; none of another tower.

    Args:
        tower: A timm or transformers model.
    """
    layers: list[nn.Module] = [module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = _timm_transformer(tower)
    return layers or ([] if inner is None else list(inner.blocks))


def _timm_transformer(tower: nn.Module) -> Any:
    return next((m for m in tower.modules() if hasattr(m, "set_grad_checkpointing") and hasattr(m, "blocks")), None)


def checkpoint_blocks(tower: nn.Module, enable: bool) -> None:
    """Lets the blocks of a vision transformer that learns keep their input only, or keep all again.

    Args:
        tower: A timm or transformers model; nothing changes where it is frozen.
        enable: Which of the two.

    Raises:
        UserError: If a tower that learns has no such blocks.
    """
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        return
    blocks, inner = tower_blocks(tower), _timm_transformer(tower)
    if enable and not blocks:
        raise UserError(
            f"Expected a vision transformer for `activation_checkpointing` of a tower that learns, got "
            f"{type(tower).__name__}, which has no blocks to compute again. Remove it, or take another tower."
        )
    if inner is not None:
        inner.set_grad_checkpointing(enable)
        return
    block: Any
    for block in blocks:
        # transformers checkpoints in training mode only; what stands in a block keeps its mode, as its dropout goes by.
        block.training = enable or block.training
        block.gradient_checkpointing = enable
        block._gradient_checkpointing_func = partial(checkpoint, **_NOT_REENTRANT)
