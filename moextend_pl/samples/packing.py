"""Several documents in one row: attention stays inside each, positions restart, an image opens its own document only.

Shapes: B batch, S sequence, N documents of a batch, numbered 1 .. N over all its rows; 0 is padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate, packed_sequence_mask_function

from moextend_pl.contracts import IGNORE_INDEX, Batch

ISOLATING_LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "attention")
"""Kinds of layers that read other tokens through a mask only, which can be cut at the borders of documents."""


def position_ids(documents_BS: Tensor) -> Tensor:
    """Counts the places of each document from 0; padding after the last document counts as one more.

    Args:
        documents_BS: Number of each token's document.

    Returns:
        (B, S) int64.
    """
    is_first_BS = F.pad(documents_BS[:, 1:] != documents_BS[:, :-1], (1, 0), value=True)
    places_BS = torch.arange(documents_BS.shape[1], device=documents_BS.device).expand_as(documents_BS)
    return places_BS - places_BS.masked_fill(~is_first_BS, 0).cummax(dim=1).values


def attention_inputs(model: PreTrainedModel, batch: Batch, asks: bool | None = None) -> dict[str, Any]:
    """Returns what tells a transformers model which tokens see each other.

    For packed rows these are restarting positions and block-diagonal causal masks, made by transformers
    itself, one for each kind of layer: a sliding layer keeps its window. The models are not left to derive
    them from the positions, since some (GPT-OSS, AFMoE in 5.23) would not. Padding becomes a document of
    its own, which nothing learns from.

    Args:
        model: Its configuration says which masks there are.
        batch: With `documents` if its rows are packed.
        asks: Whether transformers may ask the device about values, to leave masks out; by default on a CPU alone.
    """
    documents_BS = batch.get("documents")
    like_BS = batch["attention_mask"] if documents_BS is None else documents_BS
    asks = like_BS.device.type == "cpu" if asks is None else asks
    if documents_BS is None:
        mask_BS = batch["attention_mask"]
        # transformers takes no mask as one of ones; it would ask the device which of the two it was given.
        if "known" in batch and batch["known"].tokens == mask_BS.numel():
            return {"attention_mask": None}
        if asks or packing_obstacle(model.config, model.config._attn_implementation):
            return {"attention_mask": mask_BS}
        # With a further condition it does not ask whether the mask could be left out.
        return {"attention_mask": _masks(model, mask_BS, mask_BS, and_mask_function=_every_key)}
    positions_BS = position_ids(documents_BS)
    if asks or "chunked_attention" in layer_kinds(model.config):
        masks = _masks(model, positions_BS, None, position_ids=positions_BS)
    else:  # the same masks; from positions it would ask the device whether they restart
        masks = _masks(model, documents_BS, None, and_mask_function=packed_sequence_mask_function(documents_BS))
    return {"attention_mask": masks, "position_ids": positions_BS}


def _masks(model: PreTrainedModel, like_BS: Tensor, mask_BS: Tensor | None, **options: Any) -> Any:
    make_masks = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    # Read for its shape and type only.
    embeddings_BS0 = torch.empty(*like_BS.shape, 0, dtype=model.dtype, device=like_BS.device)
    return make_masks(model.config, embeddings_BS0, mask_BS, None, **options)


def _every_key(_batch: Tensor, _head: Tensor, _query: Tensor, key: Tensor) -> Tensor:
    return key >= 0


def tokens_beside(marked_BS: Tensor, documents_BS: Tensor | None) -> Tensor:
    """Tells which tokens belong to a text with a marked token, such as an image placeholder.

    Args:
        marked_BS: True on marked tokens.
        documents_BS: Number of each token's document; None where a row is one document.

    Returns:
        (B,) booleans by row, or (B, S) by token where rows are packed; False on padding.
    """
    if documents_BS is None:
        return marked_BS.any(dim=1)
    owners = documents_BS.masked_fill(~marked_BS, 0).flatten()
    is_marked_N = torch.zeros(documents_BS.numel() + 1, dtype=torch.bool, device=documents_BS.device)
    is_marked_N.index_fill_(0, owners, True)  # a value assigned by index would be copied to a GPU, which waits
    is_marked_N[:1].fill_(False)
    return is_marked_N[documents_BS]


def sample_tokens(batch: Batch) -> Tensor:
    """Tells which tokens belong to samples: neither padding nor what stands for a missing or damaged sample.

    Such a filler is one token of which nothing is learned; it must not count where tokens are counted.

    Args:
        batch: With labels; every sample has something to learn.

    Returns:
        (B, S) booleans.
    """
    learned_BS = batch["labels"] != IGNORE_INDEX
    beside = tokens_beside(learned_BS, batch.get("documents"))
    return batch["attention_mask"].bool() & (beside if beside.dim() == 2 else beside.unsqueeze(1))


def layer_kinds(config: PreTrainedConfig) -> set[str]:
    """Returns the kinds of layers that a configuration names; none where all are attention over everything."""
    text: Any = config.get_text_config()
    return set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())


def packing_obstacle(config: PreTrainedConfig, attention: str | None = None) -> str:
    """Tells why rows of several documents cannot be used with a model; empty if they can.

    Recurrent layers (Mamba, linear attention, convolutions) carry what they read across the border of a
    document, and no mask stops them. Flash attention takes no mask of its own, and transformers finds the documents
    again for it in batches of one row alone.

    Args:
        config: Of the model.
        attention: How attention is computed, as transformers names it.
    """
    if attention is not None and attention.startswith("flash"):
        return f"`attn_implementation: {attention}` does not keep the documents of a row apart"
    leaking = sorted(layer_kinds(config) - set(ISOLATING_LAYERS))
    if not leaking:
        return ""
    name, kinds = config.get_text_config().model_type, ", ".join(leaking)
    return f"{name} has layers ({kinds}) that carry what they read from one document to the next"
