"""Captions of a batch, for the contrast that trains a tower alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moextend_pl.contracts import Batch


def captions_of(batch: Batch) -> Mapping[str, Tensor]:
    """Returns the learned ids of a batch one after another.

    Args:
        batch: Its labels (B, S) are the captions.

    Returns:
        `ids`, `offsets` (B,) of the first id of each caption, and `names` (B,), equal for equal captions.
    """
    learned_BS = batch["labels"] >= 0
    counts = learned_BS.sum(dim=1)
    ids = batch["labels"][learned_BS]
    places = torch.arange(1, int(counts.max()) + 1, device=ids.device)
    rows = torch.zeros(len(counts), len(places), dtype=torch.long, device=ids.device)
    rows[places.unsqueeze(0) <= counts.unsqueeze(1)] = ids + 1
    # One number a caption, so that equal captions are found with one comparison.
    names = (rows * (places * 1_000_003 % 998_244_353)).sum(dim=1)
    return {"ids": ids, "offsets": counts.cumsum(0) - counts, "names": names}


def contrast(scores_IG: Tensor, same_IG: Tensor) -> tuple[Tensor, Tensor]:
    """Contrasts images with captions.

    Args:
        scores_IG: Similarity of each image to each caption of all ranks.
        same_IG: True where the caption is the image's own, or equal to it.

    Returns:
        The loss, and the share of images whose nearest caption is their own.
    """
    log_probs_IG = scores_IG.log_softmax(dim=-1)
    loss = -(log_probs_IG.masked_fill(~same_IG, 0.0).sum(dim=1) / same_IG.sum(dim=1)).mean()
    return loss, same_IG.gather(1, log_probs_IG.argmax(dim=1, keepdim=True)).float().mean()
