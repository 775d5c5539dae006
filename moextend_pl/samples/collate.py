"""Samples -> a batch: pure functions that pad and stack."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, count

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
    """Pads on the right and stacks; images of all samples follow each other."""
    ids, labels = [sample.input_ids for sample in samples], [sample.labels for sample in samples]
    return _with_tiles(_collate(samples, ids, labels, pad_id), samples, _tiles(samples))


def collate_packed(rows: Sequence[Sequence[Sample]], pad_id: int) -> Batch:
    """Puts several samples side by side into each row, and adds `documents`.

    Args:
        rows: B rows of at least one sample each.
        pad_id: Id of padding.
    """
    samples = [sample for row in rows for sample in row]
    ids = [torch.cat([sample.input_ids for sample in row]) for row in rows]
    labels = [torch.cat([_labels_within(sample) for sample in row]) for row in rows]
    batch = _collate(samples, ids, labels, pad_id)
    numbers = count(1)
    documents = [torch.cat([torch.full_like(sample.input_ids, next(numbers)) for sample in row]) for row in rows]
    batch["documents"] = pad(documents, 0)
    tiles = iter(_tiles(samples))
    return _with_tiles(batch, samples, [torch.cat([next(tiles) for _ in row]) for row in rows])


def collate_generation(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pads prompts on the left, so that all end where the answer begins, and adds `prompts` and `answers`.

    Args:
        samples: B samples out of `ConversationEncoder.encode_prompt`.
        pad_id: Id of padding.
    """
    ids, labels = [sample.input_ids for sample in samples], [sample.labels for sample in samples]
    batch = _collate(samples, ids, labels, pad_id, left=True)
    batch["prompts"] = [sample.prompt for sample in samples]
    batch["answers"] = [sample.answer for sample in samples]
    return _with_tiles(batch, samples, _tiles(samples), left=True)


def _labels_within(sample: Sample) -> Tensor:
    """Returns the labels without the first, which the last token of the document before would learn."""
    labels = sample.labels.clone()
    labels[0] = IGNORE_INDEX
    return labels


def _tiles(samples: Sequence[Sample]) -> list[Tensor]:
    own = [torch.zeros_like(each.input_ids) if each.tiles is None else each.tiles for each in samples]
    return numbered_tiles(own)


def numbered_tiles(own: Sequence[Tensor]) -> list[Tensor]:
    """Returns the numbers of tiles of each sample, counted over all; the last of a sample is that of its last image."""
    before = [0, *accumulate(int(tiles.max()) for tiles in own)]
    return [torch.where(tiles > 0, tiles + first, 0) for tiles, first in zip(own, before, strict=False)]


def _with_tiles(batch: Batch, samples: Sequence[Sample], rows: Sequence[Tensor], left: bool = False) -> Batch:
    """Adds `tiles` where any sample has them, and returns the batch."""
    if any(sample.tiles is not None for sample in samples):
        batch["tiles"] = pad(rows, 0, left)
    return batch


def _with_sounds(batch: Batch, samples: Sequence[Sample]) -> Batch:
    """Adds the sounds of all samples, which follow each other, where there are any."""
    sounds = [sample.sounds for sample in samples if sample.sounds is not None]
    if sounds:
        batch["sounds"] = torch.cat(sounds)
        batch["sound_keys"] = [name for sample in samples for name in sample.sound_keys]
    return batch


def _collate(
    samples: Sequence[Sample], ids: Sequence[Tensor], labels: Sequence[Tensor], pad_id: int, left: bool = False
) -> Batch:
    batch = Batch(
        keys=[sample.key for sample in samples],
        input_ids=pad(ids, pad_id, left),
        attention_mask=pad([torch.ones_like(row) for row in ids], 0, left),
        labels=pad(labels, IGNORE_INDEX, left),
        pixel_values=torch.cat([sample.pixel_values for sample in samples]),
        image_keys=[name for sample in samples for name in sample.image_keys],
        tasks=[sample.task for sample in samples],
    )
    return _with_sounds(batch, samples)
