"""What a step must know of a batch in Python, found while the batch is on the host: a GPU is asked for no value.

Shapes: B batch, S sequence, A learned positions, P image placeholders, Q sound placeholders, M most images of a
row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moextend_pl.contracts import IGNORE_INDEX, Batch, HostFacts


class Looked(NamedTuple):
    """The M images that the words of each row look at, in their order."""

    images: Tensor  # (B, M) their numbers, 0 for none
    shown: Tensor  # (B, M) number of the image whose tokens show them: their own, or their thumbnail's (NVLM-H)
    places: Tensor  # (B, M) which tile of its picture each is, from 0, where a thumbnail shows them


def with_host_facts(batch: Batch, image_token_id: int) -> Batch:
    """Adds `known` to a batch that lacks it. Cheap on the host; on a GPU it waits for the device.

    Args:
        batch: With labels.
        image_token_id: Id of image placeholders.
    """
    if "known" in batch:
        return batch
    next_BS = torch.full_like(batch["labels"], IGNORE_INDEX)
    next_BS[:, :-1] = batch["labels"][:, 1:]
    learned_BS = next_BS != IGNORE_INDEX
    known = HostFacts(
        learned=learned_BS.flatten().nonzero().squeeze(-1),
        targets=next_BS[learned_BS],
        images=is_image(batch, image_token_id).flatten().nonzero().squeeze(-1),
        tokens=int(batch["attention_mask"].sum()),
        looked=torch.stack(looked_at(batch, image_token_id)) if "tiles" in batch else None,
        sounds=is_sound(batch, image_token_id).flatten().nonzero().squeeze(-1),
    )
    return {**batch, "known": known}


def is_image(batch: Batch, image_token_id: int) -> Tensor:
    """Returns which tokens stand for images, (B, S): their placeholders, or tags where all images are looked at."""
    return batch["tiles"] > 0 if "tiles" in batch else batch["input_ids"] == image_token_id


def is_sound(batch: Batch, image_token_id: int) -> Tensor:
    """Returns which tokens stand for sounds, (B, S)."""
    return batch["input_ids"] == image_token_id + 1


def sensed(batch: Batch, image_token_id: int, routing: str) -> tuple[Tensor, int | None]:
    """Returns which tokens stand for what masked routing asks for, (B, S), and how many there are, if it is known.

    Args:
        batch: Any.
        image_token_id: Id of image placeholders.
        routing: Of an extension plan.
    """
    known = batch.get("known")
    if routing == "masked_sound":
        places = None if known is None else known.sounds
        count = None if known is None else 0 if places is None else len(places)
        return is_sound(batch, image_token_id), count
    return is_image(batch, image_token_id), None if known is None else len(known.images)


def tiles_by_row(tiles_BS: Tensor) -> Tensor:
    """Returns the numbers of each row's images in their order, (B, M), 0 where a row has fewer than M.

    Args:
        tiles_BS: As `contracts.Batch` has it: numbers rise from row to row.
    """
    last_B = tiles_BS.amax(dim=1)
    before_B = F.pad(last_B.cummax(dim=0).values[:-1], (1, 0))
    count_B = (last_B - before_B).clamp(min=0)
    place_M = torch.arange(1, int(count_B.max()) + 1, device=tiles_BS.device)
    return torch.where(place_M <= count_B[:, None], before_B[:, None] + place_M, 0)


def looked_at(batch: Batch, image_token_id: int) -> Looked:
    """Finds which images words look at: all but those that stand among the words by placeholders.

    An image without a token of its own is a tile of the picture whose thumbnail comes next.

    Args:
        batch: With `tiles`.
        image_token_id: Id of image placeholders.
    """
    tiles_BS1, numbers_BM = batch["tiles"].unsqueeze(2), tiles_by_row(batch["tiles"])
    own_BSM = (tiles_BS1 == numbers_BM.unsqueeze(1)) & (tiles_BS1 > 0)
    stands_BM = (own_BSM & (batch["input_ids"] == image_token_id).unsqueeze(2)).any(dim=1)
    has_tokens_BM = own_BSM.any(dim=1)
    later = numbers_BM.masked_fill(~has_tokens_BM, torch.iinfo(numbers_BM.dtype).max)
    shown_BM = later.flip(1).cummin(dim=1).values.flip(1)
    earlier = torch.cat([numbers_BM[:, :1] - 1, numbers_BM.masked_fill(~has_tokens_BM, 0)[:, :-1]], dim=1)
    places_BM = numbers_BM - earlier.cummax(dim=1).values - 1
    looked_BM = (numbers_BM > 0) & ~stands_BM
    # At least one, so that layers that look take part where pictures are of one tile.
    most = max(int(looked_BM.sum(dim=1).max()), 1)
    order_BM = (~looked_BM).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    kept = (each.masked_fill(~looked_BM, 0).gather(1, order_BM) for each in (numbers_BM, shown_BM, places_BM))
    return Looked(*kept)


def samples_in(batch: Batch) -> int:
    """Returns the number of samples, for Lightning's ThroughputMonitor."""
    return len(batch["keys"])


def tokens_in(batch: Batch) -> int:
    """Returns the number of real tokens, image placeholders included, for Lightning's ThroughputMonitor."""
    return batch["known"].tokens if "known" in batch else int(batch["attention_mask"].sum())
