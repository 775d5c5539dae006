"""Several documents in one row: attention stays inside each, positions restart, an image opens its own document only.

Shapes: B batch, S sequence, N documents of a batch, numbered 1 .. N over all its rows; 0 is padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

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


def attention_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Returns what tells a transformers model which tokens see each other.

    For packed rows these are restarting positions and block-diagonal causal masks, made by transformers
    itself, one for each kind of layer: a sliding layer keeps its window. The models are not left to derive
    them from the positions, since some (GPT-OSS, AFMoE in 5.23) would not. Padding becomes a document of
    its own, which nothing learns from.
    """
    documents_BS = batch.get("documents")
    if documents_BS is None:
        return {"attention_mask": batch["attention_mask"]}
    positions_BS = position_ids(documents_BS)
    make_masks = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    # Read for its shape and type only.
    embeddings_BS0 = torch.empty(*documents_BS.shape, 0, dtype=model.dtype, device=documents_BS.device)
    masks = make_masks(model.config, embeddings_BS0, None, None, position_ids=positions_BS)
    return {"attention_mask": masks, "position_ids": positions_BS}


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
    is_marked_N[owners] = True
    is_marked_N[0] = False
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


def packing_obstacle(config: PreTrainedConfig) -> str:
    """Tells why rows of several documents cannot be used with a model; empty if they can.

    Recurrent layers (Mamba, linear attention, convolutions) carry what they read across the border of a
    document, and no mask stops them.
    """
    text: Any = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    leaking = sorted(set(kinds) - set(ISOLATING_LAYERS))
    if not leaking:
        return ""
    return (
        f"{text.model_type} has layers ({', '.join(leaking)}) that carry what they read from one document to the next"
    )
