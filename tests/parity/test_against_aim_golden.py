"""Merging, importance and schedule against tensors made by the code of AIM's authors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moextend_pl.inference.token_importance import importance, kept_share, most_important
from moextend_pl.inference.token_merging import merge_most_alike, merge_tokens, merged_count

FIXTURES = Path(os.environ.get("MOEXTEND_FIXTURES", Path(__file__).parents[1] / "fixtures"))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(FIXTURES / "aim.safetensors")


def causal(logits_BHNN: Tensor) -> Tensor:
    tokens = logits_BHNN.shape[-1]
    return logits_BHNN.float().masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))


def rated(logits_BHNN: Tensor) -> Tensor:
    heads = causal(logits_BHNN).unbind(1)
    return importance(heads, torch.ones(heads[0].shape[:2], dtype=torch.bool))


def test_three_rounds_merge_as_published(golden: dict[str, Tensor]) -> None:
    sizes = {int(name.split(".")[1]) for name in golden if name.startswith("merge.")}
    assert sizes
    for tokens in sizes:
        start = golden[f"merge.{tokens}.x"]
        for rounds in (1, 2, 3):
            expected = golden[f"merge.{tokens}.round{rounds}"]
            torch.testing.assert_close(merge_tokens(start, rounds), expected, **CLOSE)
            assert merged_count(tokens, rounds) == expected.shape[1]


def test_importance_is_that_of_the_published_walk(golden: dict[str, Tensor]) -> None:
    torch.testing.assert_close(rated(golden["importance.logits"]), golden["importance.score"], **CLOSE)


def test_schedule_keeps_the_published_tokens_layer_by_layer(golden: dict[str, Tensor]) -> None:
    first_image, behind, tokens = golden["schedule.bounds"].tolist()
    first, last = golden["schedule.l1_l2"].tolist()
    kept = torch.ones(golden["schedule.kept.0"].shape, dtype=torch.bool)
    is_image = torch.zeros_like(kept)
    is_image[:, first_image:behind] = True
    for layer, logits in enumerate(golden["schedule.logits"]):
        share = kept_share(layer, first, last)
        assert share == pytest.approx(float(golden["schedule.rate"][layer]))
        if share < 1:
            # As released: tokens that were dropped are not read, but the walk begins at them too.
            scores = rated(logits.float().masked_fill(~kept[:, None, None], float("-inf")))
            counts = torch.full((len(kept),), int((behind - first_image) * share))
            kept = most_important(scores, is_image & kept, counts) | ~is_image
        assert torch.equal(kept, golden[f"schedule.kept.{layer}"]), layer
    assert tokens == kept.shape[1]


def test_tokens_that_stand_twice_are_merged_without_loss() -> None:
    torch.manual_seed(0)
    pairs = torch.randn(1, 8, 16).repeat_interleave(2, dim=1)
    merged = merge_most_alike(pairs, 8)
    assert torch.equal(merged.sort(dim=1).values, pairs[:, ::2].sort(dim=1).values)
    assert torch.equal(merge_tokens(pairs, 0), pairs)
