"""A run that was moved away from its base and tower is loaded when they are named; only the right ones are taken."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers.asked import shown
from helpers.tiny_world import QUESTION, TinyWorld, make_plan, picture
from safetensors.torch import load_file, save_file

import moextend_pl
from moextend_pl import cli
from moextend_pl.contracts import UserError
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend


def trained(world: TinyWorld) -> MoExtend:
    return world.model(make_plan(init="copy"), ["projector", "new_experts", "new_routers", "calibration"])


@pytest.fixture(scope="module")
def moved(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_delta(trained(tiny_world), folder / "run")
    (folder / "far" / "away").mkdir(parents=True)
    return Path(shutil.move(folder / "run", folder / "far" / "away" / "run"))


def test_a_moved_run_answers_as_before_when_its_base_and_tower_are_named(moved: Path, tiny_world: TinyWorld) -> None:
    for named, option in (({}, "tower"), ({"tower": tiny_world.encoder}, "base")):
        with pytest.raises(UserError, match=rf"found no .*by `{option}`, on the command line by `--{option}`"):
            MoExtend.load(moved, **named)
    loaded = moextend_pl.load(moved, base=tiny_world.base, tower=str(tiny_world.encoder))
    assert loaded.generate(shown(0), QUESTION) == trained(tiny_world).generate(shown(0), QUESTION)


def test_another_base_is_not_taken_for_it(moved: Path, tiny_world: TinyWorld, tmp_path: Path) -> None:
    shutil.copytree(tiny_world.base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="base has changed"):
        MoExtend.load(moved, base=tmp_path / "base", tower=tiny_world.encoder)


def test_a_question_from_the_shell(
    moved: Path,
    tiny_world: TinyWorld,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = []
    for number in (0, 1):
        places.append(str(tmp_path / f"{number}.png"))
        Path(places[-1]).write_bytes(picture(number))
    whole = ["generate", "--checkpoint", str(moved), "--base", str(tiny_world.base), "--tower", str(tiny_world.encoder)]
    asked = [*whole, "--image", *places, "--prompt", QUESTION, "--max-new-tokens", "3", "--stop", "no such", "word"]
    expected = trained(tiny_world).generate(places, QUESTION, max_new_tokens=3)
    assert cli.main(asked) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert cli.main([*asked, "--json", "--beams", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["answer"], told["images"], told["max_new_tokens"]) == (expected, places, 3)
    assert told["stop"] == ["no such", "word"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(asked) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    for wrong in (["--top-k", "5"], ["--image", "nowhere.png"]):
        assert cli.main([*asked, *wrong]) == 2
