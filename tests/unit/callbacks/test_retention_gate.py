"""What a model still knows is measured while it learns, and a run that forgets is stopped."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.stages import callback, write_stage
from helpers.tiny_world import TinyWorld, make_plan, perturb

import callbacks
from callbacks.retention_gate import RETENTION_FILE
from moextend_pl import cli
from moextend_pl.contracts import UserError
from moextend_pl.evaluation.retention import extended_logits, know
from moextend_pl.evaluation.retention_texts import read_texts

TEXT = "a small picture is red . what is the color ? is it blue ? no yes picture is green . a small a small"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "prose.txt").write_text(TEXT)
    return tmp_path / "prose.txt"


def stage(world: TinyWorld, tmp_path: Path, parts: list[str], gate: dict[str, Any]) -> Path:
    import yaml

    path = write_stage(world, tmp_path / "run", "align", steps=6)
    config = yaml.safe_load(path.read_text())
    for each in config["trainer"]["callbacks"]:
        if each["class_path"] == "callbacks.TrainOnly":
            each["init_args"]["parts"] = parts
    config["trainer"]["callbacks"].insert(-1, callback("RetentionGate", **gate))
    config["trainer"]["val_check_interval"] = 6
    path.write_text(yaml.safe_dump(config))
    return path


def curve(run: Path) -> dict[str, Any]:
    return json.loads((run / RETENTION_FILE).read_text())


@pytest.mark.slow
def test_run_that_keeps_its_text_goes_to_its_end(tiny_world: TinyWorld, tmp_path: Path, text: Path) -> None:
    gate = {"texts": [str(text)], "every_n_steps": 2, "max_perplexity_rise": 0.0}
    cli.run(["fit", "--config", str(stage(tiny_world, tmp_path, ["projector"], gate))])
    found = curve(tmp_path / "run")
    assert [each["step"] for each in found["history"]] == [2, 4, 6]
    language = tiny_world.language()
    expected = know(read_texts(text), language.tokenizer, extended_logits(language), language.device).perplexity
    assert {each["prose"]["perplexity"] for each in found["history"]} == {found["base"]["prose"]["perplexity"]}
    assert found["base"]["prose"]["perplexity"] == pytest.approx(expected)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        logged = [row["retention/prose_perplexity"] for row in csv.DictReader(file)]
    assert pytest.approx(expected, rel=1e-4) in [float(value) for value in logged if value]


@pytest.mark.slow
def test_run_that_forgets_is_stopped_and_writes_its_results(
    tiny_world: TinyWorld, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = {"texts": [str(text)], "every_n_steps": 2, "max_perplexity_rise": 0.0001}
    # Random weights know nothing: a model that learns anything changes its perplexity, up by noise or down.
    config = stage(tiny_world, tmp_path, ["projector", "language", "routers"], gate)
    cli.run(["fit", "--config", str(config), "--model.init_args.optim.lr", "0.3"])
    found = curve(tmp_path / "run")
    assert found["history"][-1]["step"] < 6
    assert found["history"][-1]["prose"]["perplexity"] > found["base"]["prose"]["perplexity"]
    assert "the run stops at step 2: perplexity of prose is" in capsys.readouterr().err
    assert (tmp_path / "run" / "delta.safetensors").is_file()
    # Started again, it is where it was.
    cli.run(["fit", "--config", str(config), "--model.init_args.optim.lr", "0.3"])
    assert curve(tmp_path / "run") == found


def test_limits_are_judged_as_stated(text: Path) -> None:
    gate = callbacks.RetentionGate([str(text)], max_perplexity_rise=0.1, max_accuracy_drop=0.1)
    gate.load_state_dict({"base": {"prose": {"perplexity": 10.0, "accuracy": 0.5}}, "history": []})
    assert gate._complaints({"prose": {"perplexity": 11.0, "accuracy": 0.4}}) == []
    assert len(gate._complaints({"prose": {"perplexity": 11.1, "accuracy": 0.3}})) == 2
    assert len(gate._complaints({"prose": {"perplexity": float("nan"), "accuracy": 0.5}})) == 1
    again = callbacks.RetentionGate([str(text)])
    again.load_state_dict(gate.state_dict())
    assert again.state_dict() == gate.state_dict()


def test_mistakes_are_told(tmp_path: Path, text: Path, tiny_world: TinyWorld) -> None:
    with pytest.raises(UserError, match="`every_n_steps` of RetentionGate"):
        callbacks.RetentionGate([str(text)], every_n_steps=0)
    with pytest.raises(UserError, match="`max_accuracy_drop` of RetentionGate of at least 0, got -1"):
        callbacks.RetentionGate([str(text)], max_accuracy_drop=-1)
    gate = callbacks.RetentionGate([str(text), str(text)])
    model = tiny_world.unbuilt()
    with pytest.raises(UserError, match="names of their own, got prose, prose"):
        gate.setup(None, model, "fit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="measures a moextend_pl.MoExtend, got MoELanguageModel"):
        gate.setup(None, model.language, "fit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="found no file"):
        callbacks.RetentionGate([str(tmp_path / "nowhere.txt")]).setup(None, model, "fit")  # type: ignore[arg-type]


def test_measuring_leaves_the_model_as_it_was(tiny_world: TinyWorld, text: Path) -> None:
    from moextend_pl.evaluation.retention import evaluating

    model = tiny_world.model(make_plan(), ("projector",))
    perturb(model.parts()["projector"])
    model.train()
    before = {name: part.training for name, part in model.named_modules()}
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert {name: part.training for name, part in model.named_modules()} == before
    assert any(before.values())
