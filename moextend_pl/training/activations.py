"""Activation checkpointing of a language model of which a part is frozen."""

from __future__ import annotations

from transformers import PreTrainedModel

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
