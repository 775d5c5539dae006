"""Which tokens of a batch a term is about, found while the batch is on the host.

Shapes: B batch, S sequence, T places, A positions whose logits are computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moextend_pl.contracts import IGNORE_INDEX, Batch, HostFacts
from moextend_pl.samples.host_facts import is_image

SCOPES = ("answer", "answer_own", "image", "text", "all")
"""Positions that predict a learned token; learned tokens themselves; image tokens; other tokens; all tokens."""


class Scope(NamedTuple):
    """Some tokens of a batch, sample by sample."""

    places: Tensor  # (T,) places among all B * S, rising
    rows: Tensor  # (T,) where they stand among the asked positions; empty if no logits are asked there
    counts: tuple[int, ...]  # how many each sample has; their sum is T

    def by_sample(self, values_T: Tensor) -> tuple[Tensor, ...]:
        """Returns values of the places, cut into those of each sample."""
        return values_T.split(list(self.counts))


class Places(NamedTuple):
    """What a step must know of a batch to compare two models on it."""

    asked: HostFacts  # where logits are computed: at learned positions and wherever a term asks for them
    scopes: dict[str, Scope]


class DistillBatch(Batch, total=False):
    """A batch with the places that terms are about."""

    distilled: Places


def find_scopes(batch: Batch, image_token_id: int, with_pictures: bool) -> dict[str, Tensor]:
    """Tells which tokens belong to each scope.

    Args:
        batch: On the host; rows may be packed.
        image_token_id: Id of image placeholders: their number and their place are never assumed.
        with_pictures: False leaves out samples that have a picture.

    Returns:
        (B, S) masks by name of the scope.
    """
    labels_BS, is_image_BS = batch["labels"], is_image(batch, image_token_id)
    real_BS = batch["attention_mask"].bool()
    if "documents" in batch:
        real_BS = real_BS & (batch["documents"] > 0)
    if not with_pictures:
        owner_BS = owners(batch)
        seeing = torch.zeros(len(batch["keys"]) + 1, dtype=torch.bool, device=labels_BS.device)
        seeing[owner_BS[is_image_BS]] = True
        real_BS = real_BS & ~seeing[owner_BS]
    learned_BS = (labels_BS != IGNORE_INDEX) & real_BS
    predicting_BS = torch.zeros_like(learned_BS)
    predicting_BS[:, :-1] = learned_BS[:, 1:]
    masks = predicting_BS, learned_BS, is_image_BS & real_BS, real_BS & ~is_image_BS, real_BS
    return dict(zip(SCOPES, masks, strict=True))


def owners(batch: Batch) -> Tensor:
    """Returns for each token the number of its sample, (B, S); padding of packed rows has the last number, N."""
    if "documents" in batch:
        documents_BS = batch["documents"]
        return torch.where(documents_BS > 0, documents_BS - 1, len(batch["keys"]))
    rows, length = batch["input_ids"].shape
    return torch.arange(rows, device=batch["input_ids"].device).unsqueeze(1).expand(rows, length)


def find_places(batch: Batch, known: HostFacts, masks: dict[str, Tensor], logits: set[str]) -> Places:
    """Finds where logits are computed, and what each scope reads.

    Args:
        batch: On the host.
        known: Learned positions of the batch.
        masks: (B, S) by scope.
        logits: Scopes whose logits some term reads.
    """
    tokens = batch["labels"].numel()
    asked_T = torch.zeros(tokens, dtype=torch.bool, device=known.learned.device)
    asked_T[known.learned] = True
    for name in logits:
        asked_T |= masks[name].flatten()
    targets_T = torch.full((tokens,), IGNORE_INDEX, device=known.learned.device)
    targets_T[known.learned] = known.targets
    row_of_T = asked_T.cumsum(0) - 1
    owner_T, samples = owners(batch).flatten(), len(batch["keys"])
    scopes = {}
    for name, mask_BS in masks.items():
        places = mask_BS.flatten().nonzero().squeeze(-1)
        counts = torch.bincount(owner_T[places], minlength=samples).tolist()
        rows = row_of_T[places] if name in logits else places[:0]
        scopes[name] = Scope(places, rows, tuple(counts))
    asked = known._replace(learned=asked_T.nonzero().squeeze(-1), targets=targets_T[asked_T])
    return Places(asked, scopes)
