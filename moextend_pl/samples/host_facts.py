"""What a step must know of a batch in Python, found while the batch is on the host: a GPU is asked for no value.

Shapes: B batch, S sequence, A learned positions, P image placeholders.
"""

from __future__ import annotations

import torch

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
        images=(batch["input_ids"] == image_token_id).flatten().nonzero().squeeze(-1),
        tokens=int(batch["attention_mask"].sum()),
    )
    return {**batch, "known": known}


def samples_in(batch: Batch) -> int:
    """Returns the number of samples, for Lightning's ThroughputMonitor."""
    return len(batch["keys"])


def tokens_in(batch: Batch) -> int:
    """Returns the number of real tokens, image placeholders included, for Lightning's ThroughputMonitor."""
    return batch["known"].tokens if "known" in batch else int(batch["attention_mask"].sum())
