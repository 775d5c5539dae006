"""Samples -> a batch: pure functions that pad and stack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moextend_pl.contracts import IGNORE_INDEX, Batch, Sample


def pad(rows: Sequence[Tensor], value: int, left: bool = False) -> Tensor:
    """Stacks rows of different lengths.

    Args:
        rows: B rows, each (S_i,).
        value: Fills what is missing.
        left: Whether to fill in front, as generation needs.

    Returns:
        (B, max S_i).
    """
    width = max(len(row) for row in rows)
    out = torch.full((len(rows), width), value, dtype=torch.int64)
    for line, row in zip(out, rows, strict=True):
        if left:
            line[width - len(row) :] = row
        else:
            line[: len(row)] = row
    return out


def collate_training(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pads on the right and stacks; images of all samples follow each other.

    Args:
        samples: B samples.
        pad_id: Id of padding.
    """
    return _collate(samples, pad_id, left=False)


def collate_generation(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pads prompts on the left, so that all end where the answer begins, and adds `prompts` and `answers`.

    Args:
        samples: B samples out of `ConversationEncoder.encode_prompt`.
        pad_id: Id of padding.
    """
    batch = _collate(samples, pad_id, left=True)
    batch["prompts"] = [sample.prompt for sample in samples]
    batch["answers"] = [sample.answer for sample in samples]
    return batch


def _collate(samples: Sequence[Sample], pad_id: int, left: bool) -> Batch:
    return Batch(
        keys=[sample.key for sample in samples],
        input_ids=pad([sample.input_ids for sample in samples], pad_id, left),
        attention_mask=pad([torch.ones_like(sample.input_ids) for sample in samples], 0, left),
        labels=pad([sample.labels for sample in samples], IGNORE_INDEX, left),
        pixel_values=torch.cat([sample.pixel_values for sample in samples]),
        image_keys=[name for sample in samples for name in sample.image_keys],
    )
