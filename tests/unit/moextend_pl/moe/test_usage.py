"""Counting of selections, against a Counter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from moextend_pl.moe.usage import ExpertUsage, RouterRecord, selection_counts, usage_shares

EXPERTS = {0: 3, 4: 5}


def passes(seed: int, tokens: int = 40) -> tuple[list[RouterRecord], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    records = []
    for layer, count in EXPERTS.items():
        logits = torch.randn(tokens, count, generator=generator)
        records.append(RouterRecord(layer, count, logits, logits.topk(2).indices))
    is_image = torch.rand(tokens, generator=generator) < 0.4
    is_real = torch.rand(tokens, generator=generator) < 0.7
    return records, is_image, is_real


def count(kind: str, layer: int, seeds: list[int]) -> list[int]:
    counter: Counter[int] = Counter()
    for seed in seeds:
        records, is_image, is_real = passes(seed)
        record = next(r for r in records if r.layer == layer)
        for chosen, image, real in zip(record.indices.tolist(), is_image.tolist(), is_real.tolist(), strict=True):
            if real and (kind == "all" or image == (kind == "image")):
                counter.update(chosen)
    return [counter[expert] for expert in range(EXPERTS[layer])]


@pytest.mark.parametrize("seeds", [[0], [0, 1]], ids=["one batch", "two batches"])
def test_usage_equals_a_counter(seeds: list[int]) -> None:
    usage = ExpertUsage(EXPERTS)
    for seed in seeds:
        usage.update(*passes(seed))
    got = usage.compute()
    assert set(got) == {"image", "text", "all"}
    for kind, layers in got.items():
        assert {layer: counts.tolist() for layer, counts in layers.items()} == {
            layer: count(kind, layer, seeds) for layer in EXPERTS
        }


def test_padding_is_not_counted() -> None:
    records, is_image, _ = passes(0)
    usage = ExpertUsage(EXPERTS)
    usage.update(records, is_image, torch.zeros(40, dtype=torch.bool))
    assert not any(counts.any() for counts in usage.compute()["all"].values())


def test_reset_starts_from_zero() -> None:
    usage = ExpertUsage(EXPERTS)
    usage.update(*passes(0))
    usage.reset()
    usage.update(*passes(1))
    assert usage.compute()["all"][4].tolist() == count("all", 4, [1])


def test_records_without_columns_for_new_experts_still_count_them_as_zero() -> None:
    usage = ExpertUsage({0: 4})
    indices = torch.tensor([[0, 1], [2, 1]])
    usage.update([RouterRecord(0, 4, torch.zeros(2, 3), indices)], torch.zeros(2).bool(), torch.ones(2).bool())
    assert usage.compute()["text"][0].tolist() == [1, 2, 1, 0]


def test_counts_of_masked_tokens() -> None:
    indices = torch.tensor([[0, 2], [2, 1], [2, 0]])
    assert selection_counts(indices, 4).tolist() == [2, 1, 3, 0]
    assert selection_counts(indices, 4, torch.tensor([True, False, True])).tolist() == [2, 0, 2, 0]


def test_shares_sum_to_one_and_nothing_counted_gives_zeros() -> None:
    assert usage_shares(torch.tensor([1, 3, 0])).tolist() == [0.25, 0.75, 0.0]
    assert usage_shares(torch.zeros(3, dtype=torch.long)).tolist() == [0.0, 0.0, 0.0]
