"""What a result was made from, by content, and how differences are told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.sources import CHANGES, change_json, copied
from helpers.tiny_world import TinyWorld, make_plan

from moextend_pl.contracts import UserError
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.manifest import read_manifest
from moextend_pl.runs.sources import differences, file_facts, flatten, plain, refuse_other_sources


@pytest.fixture
def finished(tiny_world: TinyWorld, tmp_path: Path) -> tuple[TinyWorld, Path]:
    """A finished run on a world that may be changed."""
    world = copied(tiny_world, tmp_path)
    save_delta(world.model(make_plan(), ["projector"]), tmp_path / "run")
    return world, tmp_path / "run"


@pytest.mark.parametrize("change", CHANGES)
def test_another_configuration_or_tokenizer_is_refused_by_the_next_stage_and_before_an_answer(
    finished: tuple[TinyWorld, Path], change: str
) -> None:
    world, run = finished
    world.unbuilt(init_from=run)
    apply, message = CHANGES[change]
    apply(world)
    for build in (lambda: world.unbuilt(init_from=run), lambda: MoExtend.load(run)):
        with pytest.raises(UserError, match=rf"run was made from something else: .*{message}.*Restore the files"):
            build()


def test_what_libraries_write_of_themselves_does_not_matter_and_neither_does_the_place(
    finished: tuple[TinyWorld, Path], tmp_path: Path
) -> None:
    world, run = finished
    change_json(world.base / "config.json", transformers_version="9.9", use_cache=False)
    change_json(world.base / "tokenizer_config.json", is_local=True)
    moved = copied(world, tmp_path / "elsewhere")
    assert moved.unbuilt(init_from=run).init_from == run


def test_files_that_change_while_a_model_is_trained_are_told_as_they_were_read(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    world = copied(tiny_world, tmp_path)
    model = world.model(make_plan(), ["projector"])
    CHANGES["eps"][0](world)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    for sources in (checkpoint["sources"]["files"], save_delta(model, tmp_path / "run").sources):
        assert sources["language/config.json: rms_norm_eps"] == 1e-05


def test_a_run_of_an_earlier_version_says_nothing_and_is_read(finished: tuple[TinyWorld, Path]) -> None:
    world, run = finished
    change_json(run / "manifest.json", sources={})
    assert read_manifest(run).sources == {}
    CHANGES["eps"][0](world)
    assert MoExtend.load(run).inherited


def test_only_files_that_decide_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": {"b": 1}, "_name_or_path": "x"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("")
    base = SimpleNamespace(base=str(tmp_path))
    assert file_facts(base, "language") == {"language/config.json: a.b": 1}
    assert list(file_facts(SimpleNamespace(tokenizer_path=tmp_path), "")) == ["tokenizer.json"]
    (tmp_path / "config.json").write_text("{")
    assert list(file_facts(base, "")) == ["config.json"]
    assert file_facts(SimpleNamespace(base=None, path=tmp_path / "none"), "encoder") == {}


def test_facts_compare_as_they_are_saved() -> None:
    facts: dict[str, Any] = {"betas": (0.9, 0.999), "deep": {"init_args": {"x": None}}}
    assert differences(flatten(plain(facts)), flatten(plain(plain(facts)))) == []
    assert flatten(facts) == {"betas": (0.9, 0.999), "deep.x": None}
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == [
        "a was 1, now (not set)",
        "b was 2, now 3",
        "c was (not set), now 4",
    ]


def test_sections_that_were_not_kept_are_not_compared() -> None:
    now = {"files": {"a": 2}, "plan": {"seed": 1}}
    refuse_other_sources({"plan": {"seed": 1}}, now, ["files", "plan"], "run", "")
    with pytest.raises(UserError, match=r"run was made from something else: files\.a was 1, now 2\. Do"):
        refuse_other_sources({"files": {"a": 1}}, now, ["files", "plan"], "run", "Do")
    refuse_other_sources({"files": {"a": 1}}, now, ["plan"], "run", "")
