"""The command line: layers of config files, runs that continue."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.cli_runs import ALLOW, error_of, fit

from callbacks import StageProgress
from moextend_pl import cli
from moextend_pl.cli import commands
from moextend_pl.cli.stage import MoExtendCLI
from moextend_pl.contracts import UserError


def write(path: Path, data: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data))
    return path


def test_layers_apply_from_the_base_upwards_and_the_command_line_last(stage: Path, tmp_path: Path) -> None:
    middle = write(tmp_path / "stages/middle.yaml", {"base": "../stage.yaml", "model": {"init_args": {"lr": 0.5}}})
    top = write(tmp_path / "stages/deep/top.yaml", {"base": [f"../{middle.name}"], "trainer": {"max_steps": 2}})
    done = fit(top, "--data.batch_size=1")
    model = done.config["fit"]["model"]["init_args"]
    assert (model["n_experts"], model["lr"]) == (2, 0.5)
    assert done.trainer.global_step == 2
    assert done.datamodule.batch_size == 1


def test_base_shared_by_two_layers_is_applied_once(stage: Path, tmp_path: Path) -> None:
    extra = {"class_path": "lightning.pytorch.callbacks.LambdaCallback"}
    shared = write(tmp_path / "shared.yaml", {"trainer": {"callbacks+": [extra]}})
    left = write(tmp_path / "left.yaml", {"base": shared.name, "seed_everything": 5})
    right = write(tmp_path / "right.yaml", {"base": shared.name})
    top = write(tmp_path / "top.yaml", {"base": [stage.name, left.name, right.name]})
    done = fit(top)
    names = [type(callback).__name__ for callback in done.trainer.callbacks]
    assert names.count("LambdaCallback") == 1
    assert names.count("ModelCheckpoint") == 1
    assert done.config["fit"]["seed_everything"] == 5


def test_later_config_does_not_apply_a_base_again(stage: Path, tmp_path: Path) -> None:
    left = write(tmp_path / "left.yaml", {"base": stage.name, "model": {"init_args": {"n_experts": 7}}})
    right = write(tmp_path / "right.yaml", {"base": stage.name, "model": {"init_args": {"lr": 0.5}}})
    model = fit(left, "--config", str(right)).config["fit"]["model"]["init_args"]
    assert (model["n_experts"], model["lr"]) == (7, 0.5)


def test_seed_is_zero_unless_set(stage: Path) -> None:
    assert fit(stage).config["fit"]["seed_everything"] == 0


def test_saved_config_starts_the_same_run_again(stage: Path, tmp_path: Path) -> None:
    first = fit(stage, "--model.lr=0.5")
    saved = tmp_path / "run" / "config.yaml"
    text = saved.read_text()
    again = fit(saved, "--fresh")
    assert again.model.lr == first.model.lr == 0.5
    assert saved.read_text() == text
    assert torch.equal(again.model.layer.weight, first.model.layer.weight)


def test_fit_continues_from_the_last_checkpoint(stage: Path) -> None:
    whole = fit(stage, "--trainer.max_steps=4", f"--trainer.default_root_dir={stage.parent / 'whole'}")
    fit(stage, "--trainer.max_steps=2")
    continued = fit(stage, "--trainer.max_steps=4")
    assert continued.trainer.global_step == 4
    assert torch.equal(continued.model.layer.weight, whole.model.layer.weight)
    assert torch.equal(fit(stage, "--trainer.max_steps=4").model.layer.weight, whole.model.layer.weight)


def test_fresh_sets_the_earlier_run_aside(stage: Path, tmp_path: Path) -> None:
    fit(stage)
    (tmp_path / "run/bad_samples.jsonl").write_text("")
    fresh = fit(stage, "--fresh", "--trainer.max_steps=1")
    assert fresh.trainer.global_step == 1
    assert (tmp_path / "run/old1/checkpoints/last.ckpt").is_file()
    assert (tmp_path / "run/old1/bad_samples.jsonl").is_file()
    assert fit(stage, "--trainer.max_steps=1").trainer.global_step == 1


RESULTS = ("delta.safetensors", "manifest.json", "extension_plan.yaml", "usage.json", "base/config.json")


def with_results(stage: Path, run: Path) -> Path:
    """A finished run with results of several kinds, which a later stage would take."""
    content = yaml.safe_load(stage.read_text())
    receipt = {"class_path": "callbacks.StageReceipt", "init_args": {"outputs": ["base", "../outside"]}}
    content["trainer"]["callbacks"].append(receipt)
    stage.write_text(yaml.safe_dump(content))
    (run / "base").mkdir(parents=True)
    (run.parent / "outside").mkdir()
    fit(stage)
    for name in RESULTS:
        (run / name).write_text("old")
    return stage


def test_fresh_leaves_no_result_of_the_earlier_run_for_a_later_stage(stage: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with_results(stage, run)
    with pytest.raises(UserError):
        fit(stage, "--fresh", "--model.fail=fit")  # as if it had been killed before its end
    assert [name for name in (*RESULTS, "stage.json") if (run / name).exists()] == []
    assert all((run / "old1" / name).exists() for name in (*RESULTS, "stage.json", "checkpoints/last.ckpt"))
    assert (tmp_path / "outside").exists()


def test_results_without_a_checkpoint_are_set_aside_when_the_run_begins_anew(stage: Path, tmp_path: Path) -> None:
    with_results(stage, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    fit(stage, "--trainer.max_steps=1")
    assert (tmp_path / "run/old1/delta.safetensors").read_text() == "old"
    assert not (tmp_path / "run/delta.safetensors").exists()


def test_a_run_stopped_before_it_had_a_result_is_not_set_aside(stage: Path, tmp_path: Path) -> None:
    fit(stage)
    (tmp_path / "run/checkpoints/last.ckpt").unlink()
    fit(stage, "--trainer.max_steps=1")
    assert not (tmp_path / "run/old1").exists()


@pytest.mark.parametrize("more", [(), ("--fresh",)])
def test_a_trial_of_one_step_leaves_the_run_as_it_was(stage: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    fit(stage, "--trainer.fast_dev_run=true", *more)
    assert not files()
    fit(stage, "--trainer.max_steps=3")
    before = files()
    trial = fit(stage, "--trainer.fast_dev_run=2", *more)
    assert trial.trainer.global_step == 2
    assert files() == before


def test_fresh_has_its_effect_once_when_slurm_starts_the_job_again(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(stage)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the first start came to an end before it did anything
    fit(stage, "--fresh")
    assert (tmp_path / "run/old1").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert fit(stage, "--fresh", "--trainer.max_steps=5").trainer.global_step == 5
    assert not (tmp_path / "run/old2").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # another job
    fit(stage, "--fresh")
    assert (tmp_path / "run/old2").exists()


def test_a_checkpoint_that_was_asked_for_is_begun_from_once_when_slurm_starts_the_job_again(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(stage)
    asked = tmp_path / "asked.ckpt"
    shutil.copy(tmp_path / "run/checkpoints/last.ckpt", asked)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for count, chosen in (("0", asked), ("1", tmp_path / "run/checkpoints/last.ckpt")):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        command = fit(stage, f"--ckpt_path={asked}", f"--trainer.max_steps={5 + int(count)}")
        assert command._checkpoint == str(chosen)


def test_changed_settings_refuse_to_continue_and_name_both_values(stage: Path, tmp_path: Path) -> None:
    fit(stage)
    before = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()
    with pytest.raises(UserError) as caught:
        fit(stage, "--model.n_experts=5", "--data.batch_size=1", "--seed_everything=3", "--model.fail=init")
    message = str(caught.value)
    for phrase in (
        "model.n_experts was 2, now 5",
        "data.batch_size was 2, now 1",
        "seed_everything was 0, now 3",
        "trainer.default_root_dir",
        "--fresh",
    ):
        assert phrase in message
    assert "trainer.max_steps" not in message
    assert (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == before


@pytest.mark.parametrize("damage", [b"\xff\x00", b"- 1\n", b"", b"model: ["])
def test_damaged_config_of_the_earlier_run_is_one_sentence(
    capsys: pytest.CaptureFixture[str], stage: Path, tmp_path: Path, damage: bytes
) -> None:
    fit(stage)
    (tmp_path / "run/config.yaml").write_bytes(damage)
    message = error_of(capsys, ["fit", "--config", str(stage), *ALLOW])
    assert message.startswith(f"{tmp_path / 'run/config.yaml'}: the earlier run's config")


def test_settings_that_change_only_speed_or_length_may_differ(stage: Path) -> None:
    fit(stage)
    done = fit(stage, "--trainer.max_steps=6", "--data.num_workers=1", "--trainer.log_every_n_steps=1")
    assert done.trainer.global_step == 6


def test_explicit_checkpoint_wins(stage: Path, tmp_path: Path) -> None:
    fit(stage, "--trainer.max_steps=1")
    early = tmp_path / "early.ckpt"
    (tmp_path / "run/checkpoints/last.ckpt").rename(early)
    fit(stage, "--trainer.max_steps=3")
    done = fit(stage, f"--ckpt_path={early}", "--trainer.max_steps=2", "--model.lr=0")
    assert done.trainer.global_step == 2
    assert done.model.lr == 0  # the config's value, not the checkpoint's


def test_test_uses_the_trained_weights_and_leaves_the_config_of_fit(stage: Path, tmp_path: Path) -> None:
    trained = fit(stage).model.layer.weight.detach()
    config = (tmp_path / "run/config.yaml").read_text()
    tested = cli.run(["test", "--config", str(stage), *ALLOW, "--data.batch_size=1"])
    assert isinstance(tested, MoExtendCLI)
    assert torch.equal(tested.model.tested, trained)
    assert (tmp_path / "run/config.yaml").read_text() == config
    assert yaml.safe_load((tmp_path / "run/config.test.yaml").read_text())["data"]["init_args"]["batch_size"] == 1


def test_test_of_an_untrained_run_warns(stage: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="moextend_pl"):
        cli.run(["test", "--config", str(stage), *ALLOW])
    assert "no checkpoint" in caplog.text


def test_several_runs_in_one_process_do_not_disturb_each_other(stage: Path, tmp_path: Path) -> None:
    argv, handlers = list(sys.argv), {name: len(logging.getLogger(name).handlers) for name in commands.OWN_LOGGERS}
    first = fit(stage, f"--trainer.default_root_dir={tmp_path / 'a'}")
    with pytest.raises(UserError):
        fit(stage, "--model.n_expert=3")
    second = fit(stage, f"--trainer.default_root_dir={tmp_path / 'b'}")
    assert torch.equal(first.model.layer.weight, second.model.layer.weight)
    assert sys.argv == argv
    for name, count in handlers.items():
        assert len(logging.getLogger(name).handlers) == max(count, 1)
    with pytest.raises(UserError, match="outside of the packages"):
        cli.run(["fit", "--config", str(stage)])  # the allowance of an earlier run is gone


def test_other_loggers_stand_beside_the_table_of_the_run(stage: Path, tmp_path: Path) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "other")}}
    command = fit(stage, f"--trainer.logger={json.dumps(logger)}")
    assert [type(each).__name__ for each in command.trainer.loggers] == ["CSVLogger", "RunLogger"]
    assert Path(command.trainer.loggers[1].log_dir) == tmp_path / "run"
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()  # and not with the first logger
    assert fit(stage, "--fresh", "--trainer.logger=false").trainer.loggers == []


def test_a_bar_that_is_switched_off_is_left_out(stage: Path) -> None:
    bar = ["--trainer.callbacks+=callbacks.StageProgress", "--trainer.enable_progress_bar"]
    assert isinstance(fit(stage, *bar, "true").trainer.progress_bar_callback, StageProgress)
    assert fit(stage, "--fresh", *bar, "false").trainer.progress_bar_callback is None
