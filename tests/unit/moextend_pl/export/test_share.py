"""A delta is shared without its base, finds the base by its name, and takes no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.loopback_hub import loopback_hub
from helpers.tiny_world import TinyWorld, make_plan, perturb, tiny_mixtral
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText

import moextend_pl
from moextend_pl import cli
from moextend_pl.contracts import PLAN_FILE, ExtensionPlan, UserError
from moextend_pl.export.share import share
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.manifest import DELTA_FILE
from moextend_pl.runs.named import name_of

PARTS = ("projector", "new_experts", "new_routers", "calibration")


@torch.no_grad()
def logits(model: MoExtend, world: TinyWorld) -> Tensor:
    batch = world.batch(model, "iti")
    return model.language(batch, model.embed(batch))


@pytest.fixture
def trained(tiny_world: TinyWorld, tmp_path: Path) -> MoExtend:
    """A model whose finished run is `tmp_path/runs/extend`."""
    model = tiny_world.model(make_plan(), parts=PARTS)
    perturb([parameter for name in PARTS for parameter in model.parts()[name]], 0.2)
    save_delta(model, tmp_path / "runs" / "extend")
    return model


def test_delta_finds_its_base_by_name_and_is_the_model_that_was_trained(
    tiny_world: TinyWorld, trained: MoExtend, tmp_path: Path
) -> None:
    out = tmp_path / "elsewhere" / "delta"
    assert cli.main(["export", str(tmp_path / "runs" / "extend"), "--target", "delta", "--out", str(out)]) == 0
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert {DELTA_FILE, "manifest.json", PLAN_FILE, "README.md", "tokenizer/tokenizer.json"} <= names
    assert {"encoder/encoder.json", "encoder/encoder.safetensors"} <= names
    assert "model.safetensors" not in names
    assert ExtensionPlan.load(out / PLAN_FILE).same_growth(make_plan())
    with safe_open(out / DELTA_FILE, "pt") as delta:
        parts = {name.split(".")[0] for name in delta.keys()}  # noqa: SIM118 - no dictionary
    assert parts == {"projector", "language"}
    with pytest.raises(UserError, match="Expected the base 'base' in"):
        moextend_pl.load(out)
    shutil.copytree(tiny_world.base, out.parent / "base")
    assert torch.equal(logits(moextend_pl.load(out), tiny_world), logits(trained, tiny_world))


def test_another_base_is_refused_by_its_tensors(trained: MoExtend, tiny_world: TinyWorld, tmp_path: Path) -> None:
    share(tmp_path / "runs" / "extend", tmp_path / "delta")
    other = tmp_path / "other"
    shutil.copytree(tiny_world.base, other)
    vocabulary = json.loads((other / "config.json").read_text())["vocab_size"]
    tiny_mixtral(vocabulary, seed=1).save_pretrained(other)
    with pytest.raises(UserError, match="the base has changed since this run was trained"):
        moextend_pl.load(tmp_path / "delta", base=other)
    tiny_mixtral(vocabulary, num_experts_per_tok=1).save_pretrained(other)
    with pytest.raises(UserError, match="num_experts_per_tok was 2, now 1"):
        moextend_pl.load(tmp_path / "delta", base=other)


def test_run_that_lies_elsewhere_is_loaded_with_its_base_named(
    trained: MoExtend, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    moved = tmp_path / "a" / "b" / "base"
    shutil.copytree(tiny_world.base, moved)
    again = moextend_pl.load(tmp_path / "runs" / "extend", base=moved)
    assert again.language.base == str(moved)
    assert again.language.tokenizer_path == str(moved)


@pytest.mark.slow
def test_merged_delta_is_the_exported_run(trained: MoExtend, tiny_world: TinyWorld, tmp_path: Path) -> None:
    share(tmp_path / "runs" / "extend", tmp_path / "delta", base="org/tiny", tower="org/tower")
    manifest = json.loads((tmp_path / "delta" / "manifest.json").read_text())
    assert manifest["bases"]["language"] == {"name": "org/tiny", "revision": ""}
    assert not (tmp_path / "delta" / "encoder").exists()
    assert "base_model: org/tiny" in (tmp_path / "delta" / "README.md").read_text()
    (tmp_path / "org").mkdir()
    shutil.copytree(tiny_world.encoder, tmp_path / "org" / "tower")
    for given in (True, False):
        if not given:
            shutil.copytree(tiny_world.base, tmp_path / "org" / "tiny")
        out = tmp_path / f"whole{given}"
        base = ["--base", str(tiny_world.base)] if given else []
        assert cli.main(["merge", str(tmp_path / "delta"), "--out", str(out), *base]) == 0
        model, batch = AutoModelForImageTextToText.from_pretrained(out), tiny_world.batch(trained, "iti")
        with torch.no_grad():
            got = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
        torch.testing.assert_close(got, logits(trained, tiny_world), atol=1e-6, rtol=0)


def test_merge_tells_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["merge", str(tmp_path), "--base", str(tmp_path / "no"), *out]) == 2
    assert "Expected the folder of the base as `--base`" in capsys.readouterr().err


def test_base_in_the_cache_of_a_hub_is_named_as_there() -> None:
    place = Path("/cache/hub/models--org--big-model/snapshots/0123abc")
    assert name_of(place) == ("org/big-model", "0123abc")
    assert name_of(Path("runs/language")) == ("language", "")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Root of the repositories of a hub on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with loopback_hub(tmp_path / "hub") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield tmp_path / "hub"


@pytest.mark.slow
def test_delta_and_base_come_from_a_hub_and_then_from_its_cache(
    trained: MoExtend, tiny_world: TinyWorld, tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share(tmp_path / "runs" / "extend", hub / "me" / "delta", base="org/tiny")
    shutil.copytree(tiny_world.base, hub / "org" / "tiny")
    expected = logits(trained, tiny_world)
    assert torch.equal(logits(moextend_pl.load("me/delta"), tiny_world), expected)
    shutil.rmtree(hub)
    assert torch.equal(logits(moextend_pl.load("me/delta"), tiny_world), expected)
    with pytest.raises(UserError, match="Expected 'me/other' in the cache of the hub or in the hub itself"):
        moextend_pl.load("me/other")
