"""The command line: every mistake is one sentence."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.cli_runs import ALLOW, error_of, fit

from moextend_pl import cli
from moextend_pl.contracts import UserError
from moextend_pl.runs.preflight import only_writer

HERE = Path(__file__).parent
ROOT = HERE.parents[3]


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
        (["--trainer.logger=lightning.pytorch.loggers.MLFlowLogger"], ["mlflow", "pip install"]),
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
    def hold_and_die() -> None:
        held = only_writer(tmp_path)
        held.__enter__()
        time.sleep(2) if os.fork() == 0 else None
        os._exit(9)

    killed = multiprocessing.get_context("fork").Process(target=hold_and_die)
    killed.start()
    killed.join()
    assert killed.exitcode == 9
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
