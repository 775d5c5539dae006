"""What a step must know of a batch in Python, found while the batch is on the host: a GPU is asked for no value.

Shapes: B batch, S sequence, A learned positions, P image placeholders, M most images of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moextend_pl.contracts import IGNORE_INDEX, Batch, HostFacts


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
        rows=tiles_by_row(batch["tiles"]) if "tiles" in batch else None,
    )
    return {**batch, "known": known}


def is_image(batch: Batch, image_token_id: int) -> Tensor:
    """Returns which tokens stand for images, (B, S): their placeholders, or tags where images are looked at."""
    return batch["tiles"] > 0 if "tiles" in batch else batch["input_ids"] == image_token_id


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


def samples_in(batch: Batch) -> int:
    """Returns the number of samples, for Lightning's ThroughputMonitor."""
    return len(batch["keys"])


def tokens_in(batch: Batch) -> int:
    """Returns the number of real tokens, image placeholders included, for Lightning's ThroughputMonitor."""
    return batch["known"].tokens if "known" in batch else int(batch["attention_mask"].sum())
