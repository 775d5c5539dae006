"""A run goes on only with what it was made from, by content: plan, configuration, tokenizer, the trainer's settings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sources import CHANGES, copied
from helpers.stages import write_stage
from helpers.tiny_world import TinyWorld, make_plan

from moextend_pl import cli
from moextend_pl.contracts import UserError

Begun = tuple[TinyWorld, Path, Path]


@pytest.fixture(scope="module")
def begun_once(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a world, a plan, and an extend run of four steps."""
    folder = tmp_path_factory.mktemp("begun")
    world = copied(tiny_world, folder)
    make_plan(sources=(1,)).save(folder / "plan.yaml")
    cli.run(["fit", "--config", str(write_stage(world, folder / "run", "extend", plan=folder / "plan.yaml", steps=4))])
    return folder


@pytest.fixture
def begun(begun_once: Path) -> Any:
    """The same, put back as it was afterwards, in its place."""
    before = begun_once.with_name("before")
    shutil.copytree(begun_once, before)
    yield begun_once
    shutil.rmtree(begun_once)
    before.rename(begun_once)


def go_on(folder: Path, *more: str) -> Any:
    config = write_stage(
        TinyWorld(folder / "world"), folder / "run", "extend", plan=folder / "plan.yaml", steps=6, every=5
    )
    return cli.run(["fit", "--config", str(config), *more])


def refused(folder: Path, message: str, *more: str) -> None:
    checkpoint = folder / "run" / "checkpoints" / "last.ckpt"
    before = checkpoint.read_bytes()
    with pytest.raises(UserError, match=message):
        go_on(folder, *more)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_another_base_configuration_or_tokenizer(begun: Path, change: str) -> None:
    apply, message = CHANGES[change]
    apply(TinyWorld(begun / "world"))
    refused(begun, rf"last\.ckpt was made from something else: .*{message}")


def test_a_run_does_not_go_on_with_a_plan_file_that_was_edited(begun: Path) -> None:
    make_plan(sources=(2,)).save(begun / "plan.yaml")
    refused(begun, r"plan\.layers was \[.*'sources': \[1\].*, now .*'sources': \[2\]")


def test_a_plan_file_may_move(begun: Path) -> None:
    (begun / "plan.yaml").rename(begun / "moved.yaml")
    assert go_on(begun, "--plan", str(begun / "moved.yaml")).trainer.global_step == 6


SETTINGS = {
    "accumulate": ("--trainer.accumulate_grad_batches=2", r"accumulate_grad_batches was 1, now 2"),
    "clip": ("--trainer.gradient_clip_val=0.5", r"gradient_clip_val was 1\.0, now 0\.5"),
    "precision": ("--trainer.precision=bf16-mixed", r"precision was 32-true, now bf16-mixed"),
    "rate": ("--model.optim.lr=0.5", r"optim\.lr was 0\.01, now 0\.5"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("how", ["by itself", "from a copy"])
def test_settings_that_make_the_result_are_those_the_run_began_with(begun: Path, setting: str, how: str) -> None:
    option, message = SETTINGS[setting]
    checkpoint = begun / "run" / "checkpoints" / "last.ckpt"
    more = [] if how == "by itself" else ["--ckpt_path", str(shutil.copy(checkpoint, begun / "mine.ckpt"))]
    refused(begun, message, option, *more)


def test_a_checkpoint_asked_for_by_name_is_compared_with_the_config_of_its_run(begun: Path) -> None:
    checkpoint = begun / "run" / "checkpoints" / "last.ckpt"
    refused(begun, r"data\.rows\.seed was .*, now 7", "--data.rows.seed=7", "--ckpt_path", str(checkpoint))


def test_more_steps_are_allowed_and_told(begun: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert go_on(begun).trainer.global_step == 6
    assert "trainer.max_steps was 4, now 6: learning rates follow the new number" in caplog.text


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(begun: Path) -> None:
    checkpoint = begun / "run" / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    del saved["sources"]
    torch.save(saved, checkpoint)
    assert go_on(begun).trainer.global_step == 6


@pytest.mark.parametrize("change", ["eps", "words swapped"])
def test_another_configuration_is_refused_when_a_run_is_measured(begun: Path, change: str) -> None:
    apply, message = CHANGES[change]
    command: Callable[..., Any] = cli.run
    config = begun / "run" / "config.yaml"
    command(["validate", "--config", str(config), "--trainer.precision=bf16-mixed"])  # how it is measured is free
    apply(TinyWorld(begun / "world"))
    with pytest.raises(UserError, match=message):
        command(["validate", "--config", str(config)])
