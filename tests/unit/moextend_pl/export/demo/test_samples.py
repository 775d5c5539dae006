"""Examples are questions about pictures of the run's own data, where it is here and whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.tiny_world import QUESTION, TinyWorld, picture

from moextend_pl.export.demo.samples import run_samples


def run_with(folder: Path, **data: object) -> Path:
    run = folder / "runs" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": data}}))
    return run


def test_examples_are_asked_about_pictures_that_differ(tiny_world: TinyWorld, tmp_path: Path) -> None:
    sets = {"text": tiny_world.data("text", "test"), "vqa": tiny_world.data("vqa", "test")}
    run = run_with(tmp_path, train="nowhere", val="http://127.0.0.1/set", test=sets)
    found = run_samples(run, 3)
    assert [(one.question, one.picture, one.name) for one in found] == [
        (QUESTION, picture(number), f"i{number:03d}.png") for number in (24, 25, 26)
    ]


def test_data_is_found_beside_a_run_that_was_named_from_elsewhere(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_world.root)
    run = run_with(tmp_path, val="data/set")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "set").symlink_to(tiny_world.data("vqa"))
    assert len(run_samples(run, 2)) == 2


@pytest.mark.parametrize("config", ["", "data: [1]", "data: {init_args: {val: 3, test: [x]}}", ": :", "data: {a: *b}"])
def test_a_run_that_does_not_say_its_data_has_none(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.yaml").write_text(config)
    assert run_samples(tmp_path, 3) == []
    assert run_samples(tmp_path / "nowhere", 3) == []


def test_what_is_damaged_is_left_out(tiny_world: TinyWorld, tmp_path: Path) -> None:
    run = run_with(tmp_path, val=str(tmp_path / "set"))
    (tmp_path / "set").mkdir()
    whole = (Path(tiny_world.data("vqa")) / "00000.tar").read_bytes()
    shard = tmp_path / "set" / "00000.tar"
    shard.write_bytes(whole[: len(whole) // 2])
    assert 0 < len(run_samples(run, 99)) < 8
    shard.write_bytes(whole.replace(picture(0)[:8], b"notapng!"))
    assert run_samples(run, 99) == []
    shard.write_bytes(whole.replace(b'"conversations"', b'"conversation_"'))
    assert run_samples(run, 99) == []
