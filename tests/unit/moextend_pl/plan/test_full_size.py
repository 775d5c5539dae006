"""The full-size recipes on the meta device: every stage builds, and its parameters number what is published."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from moextend_pl.plan.cost import NF4_BYTES, RunShape, memory
from moextend_pl.plan.facts import ModelShape
from moextend_pl.plan.shapes import read_shape
from moextend_pl.plan.stage_model import StageModel, read_stage

ROOT = Path(__file__).parents[4]
RECIPES = ("mixtral_8x7b", "qwen3_30b_a3b", "olmoe_1b_7b")
STAGES = ("1_align", "2_probe", "3_extend")
# Totals of the published checkpoints.
STOCK = {"mixtral_8x7b": 46_702_792_704, "qwen3_30b_a3b": 30_532_122_624, "olmoe_1b_7b": 6_919_161_856}
# Parameters of the published tower, of its last block, which is not built since nothing reads it, and image tokens.
CLIP, SIGLIP = (303_507_456, 12_596_224, 576), (428_225_600, 15_239_504, 729)
TOWERS = {"mixtral_8x7b": CLIP, "qwen3_30b_a3b": SIGLIP, "olmoe_1b_7b": CLIP}


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@cache
def stage(recipe: str, name: str) -> StageModel:
    return read_stage(["--config", f"configs/{recipe}/{name}.yaml"])


@cache
def shape(recipe: str, name: str) -> ModelShape:
    return read_shape(stage(recipe, name).module, compute_bytes=2)


def numbers(recipe: str, name: str) -> dict[str, int]:
    return {part.name: part.parameters for part in shape(recipe, name).parts}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_stage_builds_without_weights_and_learns_what_its_file_says(recipe: str, name: str) -> None:
    built = stage(recipe, name)
    assert {p.device.type for p in built.module.parameters()} == {"meta"}
    assert {p.dtype for p in built.module.parameters()} == {torch.bfloat16}
    text: dict[str, Any] = yaml.safe_load((ROOT / "configs" / recipe / f"{name}.yaml").read_text())
    wanted = [c["init_args"]["parts"] for c in text["trainer"]["callbacks+"] if c["class_path"].endswith("TrainOnly")]
    learning = [part.name for part in shape(recipe, name).parts if part.learning]
    assert sorted(learning) == sorted(wanted[0])
    assert all(part.learning in (0, part.parameters) for part in shape(recipe, name).parts)


@pytest.mark.parametrize("recipe", RECIPES)
def test_stock_model_and_tower_have_their_published_sizes(recipe: str) -> None:
    got = numbers(recipe, "1_align")
    assert got["language"] + got["routers"] == STOCK[recipe]
    published, last_block, tokens = TOWERS[recipe]
    assert got["encoder"] + got["encoder_unread"] == published - last_block
    assert shape(recipe, "1_align").tokens_per_image == tokens


def test_stock_totals_are_those_of_transformers() -> None:
    configs = {
        "mixtral_8x7b": MixtralConfig(),
        "qwen3_30b_a3b": AutoConfig.for_model("qwen3_moe", num_hidden_layers=48, num_attention_heads=32, head_dim=128),
        "olmoe_1b_7b": AutoConfig.for_model("olmoe", intermediate_size=1024),
    }
    for recipe, config in configs.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == STOCK[recipe]


def test_extension_of_mixtral_adds_exactly_the_published_parameters() -> None:
    got = numbers("mixtral_8x7b", "3_extend")
    assert got["new_experts"] == 2_818_572_288
    assert got["new_routers"] == 65_536
    assert got["calibration"] == 4_608
    assert got["projector"] == 20_979_712
    assert got["language"] + got["routers"] == STOCK["mixtral_8x7b"]


@pytest.mark.parametrize(
    ("recipe", "layers", "width", "inner", "experts", "channels"),
    [("qwen3_30b_a3b", 24, 2048, 768, 128, 1152), ("olmoe_1b_7b", 8, 2048, 1024, 64, 1024)],
)
def test_extension_of_half_of_the_layers_adds_one_expert_each(
    recipe: str, layers: int, width: int, inner: int, experts: int, channels: int
) -> None:
    got = numbers(recipe, "3_extend")
    assert got["new_experts"] == layers * 3 * width * inner
    assert got["new_routers"] == layers * width
    assert got["calibration"] == layers * 2 * (experts + 1) * 2 * experts
    assert got["projector"] == channels * width + width + width * width + width


def test_delta_holds_what_is_new_and_nothing_of_the_base() -> None:
    new = 2_818_572_288 + 65_536 + 4_608 + 20_979_712
    assert shape("mixtral_8x7b", "3_extend").delta_bytes == 2 * new
    assert shape("mixtral_8x7b", "1_align").delta_bytes == 2 * 20_979_712


def test_four_bits_hold_mixtral_in_the_calculated_size() -> None:
    run = RunShape(gpus=1, micro_batch=1, accumulate=1, steps=1, length=1024, mean_length=1024)
    align = shape("mixtral_8x7b", "1_align")
    others = (
        sum(part.bytes for part in align.parts if part.name in ("encoder", "encoder_unread", "projector"))
        + align.buffer_bytes
    )
    whole, packed = (memory(align, RunShape(**{**vars(run), "nf4": nf4})).weights - others for nf4 in (False, True))
    assert whole == 2 * STOCK["mixtral_8x7b"]
    # Embeddings, head, norms and routers stay in 16 bits: 2 x 32000 x 4096, 65 x 4096 and 32 x 8 x 4096.
    kept = 2 * 32_000 * 4096 + 65 * 4096 + 32 * 8 * 4096
    assert packed == pytest.approx(2 * kept + NF4_BYTES * (STOCK["mixtral_8x7b"] - kept), rel=1e-12)
    assert packed / whole < 0.30


def test_published_plan_is_the_paper_s() -> None:
    growth = stage("mixtral_8x7b", "3_extend").module.extension_plan.layers
    assert [g.layer for g in growth] == [2, 3, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 19, 20, 25, 27]
    assert [g.sources for g in growth] == [(s,) for s in (1, 3, 3, 1, 0, 7, 2, 7, 0, 5, 5, 3, 0, 3, 3, 1)]
