"""The command line: commands, layers, one-line errors, runs that continue."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moextend_pl import cli
from moextend_pl.contracts import UserError
from moextend_pl.preflight import only_writer
from moextend_pl.stage_cli import MoExtendCLI

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ALLOW = ["--allow-class-path", "toy_stage"]

STAGE = """\
trainer:
  default_root_dir: {run}
  max_steps: 3
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{filename: last, every_n_train_steps: 1, enable_version_counter: false}}
model:
  class_path: toy_stage.Toy
  init_args:
    n_experts: 2
data:
  class_path: toy_stage.ToyData
"""


@pytest.fixture(autouse=True)
def _toy_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    path = tmp_path / "stage.yaml"
    path.write_text(STAGE.format(run=tmp_path / "run"))
    return path


def fit(stage: Path, *more: str) -> Any:
    return cli.run(["fit", "--config", str(stage), *ALLOW, *more])


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Runs a command that must fail as a user's mistake and returns its one line."""
    assert cli.main(argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0].removeprefix("error: ")


def test_overview_lists_every_command_and_imports_no_torch() -> None:
    code = "import sys; from moextend_pl.cli import main; rc = main([]); print('torch' in sys.modules, rc)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False 0"
    for command in (*cli.STAGE_COMMANDS, *cli.TOOL_COMMANDS):
        assert sum(line.startswith(f"  {command} ") for line in out.splitlines()) == 1


@pytest.mark.parametrize("flag", ["-h", "--help", "help"])
def test_help_is_the_overview(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert cli.main([flag]) == 0
    assert capsys.readouterr().out == cli.overview()


def test_mistyped_command_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, ["fti"]) == "there is no command 'fti'; did you mean 'fit'?"


def test_help_of_a_stage_command_returns_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["fit", "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: python -m moextend_pl" in out
    assert "--fresh" in out


def test_tool_command_gets_the_remaining_words(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    tool = type(sys)("toy_tool")
    tool.main = lambda argv: seen.append(argv) or 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_tool", tool)
    monkeypatch.setitem(cli.TOOL_COMMANDS, "shards", ("toy_tool", ""))
    assert cli.main(["shards", "build", "--out", "x"]) == 5
    assert seen == [["build", "--out", "x"]]


def test_real_process_exits_with_two_one_line_and_no_traceback(stage: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    command = [sys.executable, "-m", "moextend_pl", "fit", "--config", str(stage), *ALLOW, "--model.n_expert=3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=stage.parent)
    assert done.returncode == 2
    assert done.stderr == "error: toy_stage.Toy does not accept 'model.n_expert'; did you mean 'n_experts'?\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.n_expert=3"], "toy_stage.Toy does not accept 'model.n_expert'; did you mean 'n_experts'?"),
        (["--model.init_args.n_expert=3"], "toy_stage.Toy does not accept 'model.n_expert'; did you mean 'n_experts'?"),
        (["--data.batchsize", "3"], "toy_stage.ToyData does not accept 'data.batchsize'; did you mean 'batch_size'?"),
        (
            ["--model.inner.class_path=toy_stage.Inner", "--model.inner.init_args.widht=3"],
            "toy_stage.Inner does not accept 'model.inner.widht'; did you mean 'width'?",
        ),
        (["--model.inne.class_path=x"], "toy_stage.Toy does not accept 'model.inne.class_path'; did you mean 'inner'?"),
        (["--model.n_experts=three"], "`model.n_experts`: expected int, got 'three'."),
        (["--trainer.max_steps=three"], "`trainer.max_steps`: expected int, got 'three'."),
        (["--trainer.max_step=3"], "there is no option '--trainer.max_step'; did you mean 'max_steps'?"),
        (["--seed_everything=x"], "`seed_everything`: expected bool or int, got 'x'."),
        (
            ["--model.class_path=toy_stage.Toi"],
            "`model`: cannot import 'toy_stage.Toi' (module 'toy_stage' has no attribute 'Toi'); "
            "did you mean 'toy_stage.Toy'?",
        ),
        (["--model.fail=init"], "the base is missing"),
        (["--model.fail=fit"], "sample 7 has no answer"),
        (["--config"], "expected a value after --config, got none."),
        (["--base=x.yaml"], "`base` belongs into a config file; on the command line give several `--config`."),
    ],
)
def test_mistake_in_an_option_is_one_sentence(
    capsys: pytest.CaptureFixture[str], stage: Path, options: list[str], expected: str
) -> None:
    assert error_of(capsys, ["fit", "--config", str(stage), *ALLOW, *options]) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.devices=-3"], ["the trainer refuses its settings", "devices"]),
        (["--trainer.strategy=nonsense"], ["the trainer refuses its settings", "strategy='nonsense'"]),
        (
            ["--model.class_path=moextend_pl.nowhere.Toy"],
            ["`model`: cannot import 'moextend_pl.nowhere.Toy'", "spelled"],
        ),
        (["--model.class_path=moextend_pl.MoExtnd"], ["cannot import", "did you mean 'moextend_pl.MoExtend'?"]),
        (
            ["--data=datamodules.ImageTextShards", "--data.train=[{path: a, wieght: 2}]"],
            ["ShardSet does not accept 'data.train.wieght'; did you mean 'weight'?"],
        ),
        (["--model.init_args=[1]"], ["`model`: expected `init_args` to hold names and values"]),
        (["--bogus", "3"], ["no option '--bogus'", "seed_everything"]),
        (["--model=toy_stage.Inner"], ["`model`", "subclass of LightningModule", "toy_stage.Inner"]),
        (["--trainer.precision=7"], ["`trainer.precision`", "bf16-mixed", "'7'"]),
        (["--ckpt_path=nowhere.ckpt"], ["nowhere.ckpt", "no checkpoint either"]),
        (["--ckpt_path=x", "--fresh"], ["choose one", "--ckpt_path", "--fresh"]),
        (["--ckpt_path=best"], ["'best'", "no checkpoint either"]),
        (["--seed_everything=-1"], ["`seed_everything`", "from 0 to 4294967295", "-1"]),
        (["--seed_everything=4294967296"], ["`seed_everything`", "from 0 to 4294967295"]),
        (["--trainer.accumulate_grad_batches=0"], ["`trainer.accumulate_grad_batches` above 0, got 0"]),
        (["--trainer.val_check_interval=0"], ["`trainer.val_check_interval` above 0, got 0"]),
        (["--trainer.accelerator=tpu"], ["the trainer refuses its settings", "torch_xla"]),
        (["--trainer.precision=transformer-engine"], ["the trainer refuses its settings", "transformer_engine"]),
        (["--trainer.logger=lightning.pytorch.loggers.WandbLogger"], ["wandb", "pip install"]),
        (["--trainer.max_epochs=0"], ["took no step", "trainer.max_epochs"]),
        (["--trainer.limit_train_batches=0"], ["took no step", "limit_train_batches"]),
    ],
)
def test_mistake_in_an_option_names_key_and_value(
    capsys: pytest.CaptureFixture[str], stage: Path, options: list[str], words: list[str]
) -> None:
    message = error_of(capsys, ["fit", "--config", str(stage), *ALLOW, *options])
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model:\n  init_args:\n    n_expert: 3\n",
            "{file}:3: toy_stage.Toy does not accept 'model.n_expert'; did you",
        ),
        ("data:\n  lr: 3\nmodel:\n  init_args: {lr: 3}\n", "{file}:2: toy_stage.ToyData does not accept 'data.lr'"),
        ("modell:\n  a: 3\n", "{file}:2: `fit` does not accept 'modell.a'; did you mean 'model'?"),
        ("trainer:\n  max_step: 3\n", "{file}:2: `fit` does not accept 'trainer.max_step'; did you mean 'max_steps'?"),
        (
            "trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.Timer\n"
            "      init_args: {duratio: 3}\n",
            "{file}:4: lightning.pytorch.callbacks.Timer does not accept 'trainer.callbacks.duratio'; did you mean",
        ),
        ("model:\n  init_args: [\n", "{file}:3:1: not valid YAML, "),
        ("model:\n\tx: 3\n", "{file}:2:1: not valid YAML, found character '\\t' that cannot start any token."),
        ("", "{file}: expected keys such as `model:` and `data:`, got an empty file."),
        ("- a\n- b\n", "{file}: expected keys such as `model:` and `data:`, got a list."),
        ("seed_everything: 1\nseed_everything: 2\n", "{file}:2: the key 'seed_everything' stands twice (first in line"),
        ("base: [nowhere.yaml]\n", "{file}: expected a config file at '{folder}/nowhere.yaml', found nothing"),
        ("base: {a: 3}\n", "{file}:1: expected `base` to be a list of files"),
        ("base: [more.yaml]\n", "{file}: the `base` files form a circle: {file} -> {file}."),
        ("model:\n  class_path: os.system\n", "{file}:2: 'os.system' is outside of the packages that a config may"),
        ("data: evil.Data\n", "{file}:1: 'evil.Data' is outside of the packages that a config may import"),
    ],
)
def test_mistake_in_a_file_names_its_line(
    capsys: pytest.CaptureFixture[str], stage: Path, text: str, expected: str
) -> None:
    more = stage.with_name("more.yaml")
    more.write_text(text)
    message = error_of(capsys, ["fit", "--config", str(stage), "--config", str(more), *ALLOW])
    assert message.startswith(expected.format(file=more, folder=more.parent))


def test_argument_that_a_callback_lacks_is_named_and_nothing_else(
    capsys: pytest.CaptureFixture[str], stage: Path
) -> None:
    argv = ["fit", "--config", str(stage), *ALLOW, "--trainer.callbacks+=callbacks.TrainOnly"]
    assert error_of(capsys, argv) == "`trainer.callbacks`: callbacks.TrainOnly lacks parts. Set it under `init_args`."


def test_missing_file_names_path_and_current_directory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_of(capsys, ["fit", "--config", "nowhere.yaml"])
    assert "'nowhere.yaml', found nothing" in message
    assert str(tmp_path) in message
    assert "found a directory" in error_of(capsys, ["fit", "--config", str(tmp_path)])


def test_run_without_a_stage_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, ["fit"]).startswith("the run lacks data, model. Give a stage file")


def test_run_without_a_directory_is_refused(capsys: pytest.CaptureFixture[str], stage: Path) -> None:
    argv = ["fit", "--config", str(stage), *ALLOW, "--trainer.default_root_dir=null"]
    assert "trainer.default_root_dir" in error_of(capsys, argv)


@pytest.mark.parametrize("place", ["file", "file/run"])
@pytest.mark.parametrize("command", ["fit", "test"])
def test_run_directory_that_cannot_be_made_is_refused_before_anything_is_built(
    capsys: pytest.CaptureFixture[str], stage: Path, tmp_path: Path, command: str, place: str
) -> None:
    (tmp_path / "file").touch()
    options = [*ALLOW, f"--trainer.default_root_dir={tmp_path / place}", "--model.fail=init"]
    message = error_of(capsys, [command, "--config", str(stage), *options])
    assert f"run directory that can be written to at {tmp_path / place}" in message


def test_disk_that_runs_full_is_one_sentence(
    capsys: pytest.CaptureFixture[str], stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(trainer: Any, path: Path, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", fill)
    message = error_of(capsys, ["fit", "--config", str(stage), *ALLOW])
    assert "last.ckpt: No space left on device" in message
    monkeypatch.setenv("MOEXTEND_TRACEBACK", "1")
    with pytest.raises(OSError, match="No space"):
        cli.main(["fit", "--config", str(stage), *ALLOW])


def test_second_run_in_the_same_directory_is_refused_while_the_first_lasts(
    capsys: pytest.CaptureFixture[str], stage: Path, tmp_path: Path
) -> None:
    half_written = tmp_path / "run" / ".delta.safetensors.1.tmp"
    with contextlib.ExitStack() as first:
        half_written.parent.mkdir()
        first.enter_context(only_writer(tmp_path / "run"))
        half_written.touch()
        message = error_of(capsys, ["fit", "--config", str(stage), *ALLOW])
        assert message.startswith(f"another run writes to {tmp_path / 'run'} (process {os.getpid()} on ")
        assert half_written.exists()
        assert cli.main(["test", "--config", str(stage), *ALLOW]) == 0  # which only reads
    assert cli.main(["fit", "--config", str(stage), *ALLOW]) == 0
    assert not half_written.exists()


def test_run_that_was_killed_is_waited_for_until_its_workers_have_ended(tmp_path: Path) -> None:
    # The process dies at once; its child, like a forked data worker, holds the same open file for two seconds more.
    code = (
        "import os, sys, time; from pathlib import Path; from moextend_pl.preflight import only_writer\n"
        "held = only_writer(Path(sys.argv[1])); held.__enter__()\n"
        "time.sleep(2) if os.fork() == 0 else None\n"
        "os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL)
    assert done.returncode == 9
    start = time.monotonic()
    with only_writer(tmp_path):
        assert time.monotonic() - start > 0.5


def test_run_that_failed_lets_the_next_one_write(capsys: pytest.CaptureFixture[str], stage: Path) -> None:
    argv = ["fit", "--config", str(stage), *ALLOW]
    for mistake in ("init", "fit"):
        error_of(capsys, [*argv, f"--model.fail={mistake}"])
        with pytest.raises(KeyError):
            cli.main([*argv, "--model.fail=bug"])
    assert cli.main(argv) == 0


def test_class_outside_the_allowed_packages_is_refused_before_its_import(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for options in (["--model=evil_module.Model"], ["--model.class_path", "evil_module.model"]):
        message = error_of(capsys, ["fit", *options])
        assert "--allow-class-path evil_module" in message
        assert "A config runs code" in message
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize(
    "message", ["DataLoader worker (pid 7) is killed by signal: Killed.", "DataLoader timed out after 900 seconds"]
)
def test_death_of_a_data_worker_is_one_sentence(stage: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def die(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("toy_stage.Toy.training_step", die)
    with pytest.raises(UserError, match=r"has died.*DataLoader .*Lower `num_workers`"):
        fit(stage)
    message = "a bug"
    with pytest.raises(RuntimeError, match="a bug"):
        fit(stage)


def test_bug_keeps_its_traceback(stage: Path) -> None:
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["fit", "--config", str(stage), *ALLOW, "--model.fail=bug"])


def test_traceback_of_a_mistake_is_shown_on_demand(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEXTEND_TRACEBACK", "1")
    with pytest.raises(UserError, match="n_experts"):
        cli.main(["fit", "--config", str(stage), *ALLOW, "--model.n_expert=3"])


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
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert fit(stage, "--fresh", "--trainer.max_steps=5").trainer.global_step == 5
    assert not (tmp_path / "run/old1").exists()


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
    argv, handlers = list(sys.argv), {name: len(logging.getLogger(name).handlers) for name in cli.OWN_LOGGERS}
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


def test_only_commands_that_go_on_say_so_when_they_are_interrupted(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(cli, "run", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    for command, told in {"fit": True, "shards build llava": True, "shards check": False, "test": False}.items():
        assert (cli.main(command.split()), "continues" in capsys.readouterr().err) == (130, told)


def test_own_messages_go_to_stderr_in_short_form(capsys: pytest.CaptureFixture[str]) -> None:
    cli.configure_logging()
    cli.configure_logging()
    logging.getLogger("callbacks.anything").info("grew %d experts", 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(" I grew 2 experts")
