"""The verdict: what fits, what does not, and remedies that hold what they promise."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from moextend_pl.contracts import UserError
from moextend_pl.plan.advice import USABLE, fits, remedies, verdict
from moextend_pl.plan.cost import RunShape
from moextend_pl.plan.facts import GPUS, Gpu, ModelShape, choose_gpu
from moextend_pl.plan.shapes import read_shape
from moextend_pl.plan.sharing import memory
from moextend_pl.plan.stage_model import read_stage

ROOT = Path(__file__).parents[4]
RUN = RunShape(gpus=1, micro_batch=6, accumulate=4, steps=10, length=2048, mean_length=2048.0)


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@cache
def shape(recipe: str) -> ModelShape:
    return read_shape(read_stage(["--config", f"configs/{recipe}/3_extend.yaml"]).module, 2)


def card(gigabytes: float) -> Gpu:
    return Gpu("card", gigabytes * 1e9, 1e14)


@pytest.mark.parametrize("recipe", ["mixtral_8x7b", "olmoe_1b_7b"])
@pytest.mark.parametrize("gigabytes", [8, 24, 48, 80, 110, 141, 192, 400])
def test_every_remedy_fits_and_keeps_the_global_batch(recipe: str, gigabytes: float) -> None:
    model, gpu = shape(recipe), card(gigabytes)
    if fits(model, RUN, gpu):
        assert verdict(model, RUN, gpu).startswith("fits: ")
        return
    for remedy in remedies(model, RUN, gpu):
        assert remedy.bytes == memory(model, remedy.run).total
        assert remedy.bytes <= USABLE * gpu.memory
        assert remedy.run.micro_batch * remedy.run.accumulate == RUN.micro_batch * RUN.accumulate
    assert verdict(model, RUN, gpu).startswith("does not fit: ")


def test_some_card_needs_each_kind_of_remedy() -> None:
    texts = [remedy.text for size in range(8, 200, 4) for remedy in remedies(shape("olmoe_1b_7b"), RUN, card(size))]
    for words in (
        r"^[23] sequences of 2,048", r"^1 sequence of 1,\d+", "^`quantize: nf4`$", "^`quantize: nf4` with 1", "fsdp2",
    ):  # fmt: skip
        assert any(re.search(words, text) for text in texts), words


def test_weights_that_exceed_the_card_are_said_first() -> None:
    text = verdict(shape("mixtral_8x7b"), RUN, GPUS["a100-80g"])
    assert text.startswith("does not fit: the weights alone take 99.7 GB, 80.6 GB of 84.8 GB usable on a100-80g;")
    assert "nf4" not in text  # what learns, with its masters, would not fit beside 33 GB of packed weights either
    alone = replace(RUN, micro_batch=1, accumulate=24)
    assert "nf4" in verdict(shape("mixtral_8x7b"), alone, GPUS["h200"])


def test_hopeless_case_says_so() -> None:
    tight = replace(RUN, micro_batch=1, accumulate=1, length=640, mean_length=640.0, nf4=True)
    assert verdict(shape("olmoe_1b_7b"), tight, card(0.5)).endswith("take a larger card")


def test_card_is_named_or_described() -> None:
    assert choose_gpu(None) is None
    assert choose_gpu("H200") == GPUS["h200"]
    own = choose_gpu("mine", 100, 30)
    assert own is not None
    assert (own.name, own.memory, own.flops) == ("mine", 30e9, 100e12)
    slow = choose_gpu("h100", tflops=400)
    assert slow is not None
    assert (slow.memory, slow.flops) == (GPUS["h100"].memory, 400e12)
    with pytest.raises(UserError, match=r"Expected `--gpu` among .*, got 'mine'"):
        choose_gpu("mine", tflops=100)
