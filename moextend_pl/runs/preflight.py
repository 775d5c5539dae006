"""What is settled before a model is built: which checkpoint a run starts from, and whether it may."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from moextend_pl.contracts import PLAN_FILE, UserError
from moextend_pl.runs.checkpoint import CHECKPOINT_FOLDER, LAST_CHECKPOINT, newest_valid
from moextend_pl.runs.manifest import DELTA_FILE, MANIFEST_FILE, NEW_DELTA_FILE
from moextend_pl.runs.plain_yaml import read_yaml
from moextend_pl.runs.sources import TRAINER, differences, flatten, told

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
ORPHANS_END = 10  # seconds; torch's data workers look for their parent every five
RESULT_SECTIONS = ("model", "data", "seed_everything")
# The order of samples is a function of seed and epoch alone, so these change speed and nothing else.
SPEED_KEYS = ("num_workers", "pin_memory", "prefetch_factor", "persistent_workers")
PLAN_ARGUMENTS = ("parts", "plan")  # a callback with one of these decides what learns or grows
RESULTS = ("stage.json", MANIFEST_FILE, DELTA_FILE, NEW_DELTA_FILE, PLAN_FILE)
RUN_RECORDS = (
    *(CHECKPOINT_FOLDER, CONFIG_FILE, "metrics.csv", "bad_samples.jsonl", "ledger.jsonl", "expert_usage.jsonl"),
    *(*RESULTS, "frozen.json", "usage.json", "plots"),
    *("retention_in_training.json", "evaluation", "tensorboard", "wandb", "mlflow", "mlflow.db", "loggers.json"),
)

_log = logging.getLogger(__name__)


def run_directory(config: dict[str, Any]) -> Path:
    """Returns the run directory of a parsed config.

    Raises:
        UserError: If there is none.
    """
    folder = (config.get("trainer") or {}).get("default_root_dir")
    if not folder:
        raise UserError(
            "expected `trainer.default_root_dir`, the directory of this run, found none. "
            "Set it in the stage file or add for example `--trainer.default_root_dir runs/my_run`."
        )
    return Path(folder)


def check_writable(run: Path) -> None:
    """Makes a run directory, and writes a few bytes into it and takes them back.

    Raises:
        UserError: If that fails, before anything expensive is built.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run) as file:
            file.write(b"room?")
            file.flush()
    except OSError as error:
        raise UserError(
            f"expected a run directory that can be written to at {run}, got: {error.strerror or error}. Name another "
            "`trainer.default_root_dir`, or mend this one."
        ) from error


@contextlib.contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Keeps a second run out of a run directory; a run that dies, however it dies, leaves it open.

    Raises:
        UserError: If another run writes there.
    """
    with (run / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            _lock(file)
        except BlockingIOError as error:
            raise UserError(
                f"another run writes to {run} ({_holder(file) or 'unknown'}). Wait until it has ended, or use "
                "another `trainer.default_root_dir`."
            ) from error
        except OSError as error:  # some file systems of clusters know no locks
            _log.warning("%s cannot be locked (%s): let no second run write there", run, error.strerror)
        file.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        file.write(f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}\n")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # for forked workers too, which hold the same file


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip()


def _lock(file: TextIO) -> None:
    """Locks a file; waits where the process that holds it was killed, until its data workers have noticed that."""
    for wait in (*[1.0] * ORPHANS_END, 0.0):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not wait or not _is_dead(_holder(file)):
                raise
            time.sleep(wait)


def _is_dead(holder: str) -> bool:
    match = re.match(r"process (\d+) on ([^ ,]+)", holder)
    if match is None or match[2] != socket.gethostname():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def choose_checkpoint(run: Path, asked: str | None, fresh: bool) -> str | None:
    """Returns the checkpoint a command starts from: the one asked for, else the run's last undamaged one, else none.

    Args:
        run: The run directory.
        asked: Value of `--ckpt_path`.
        fresh: Whether earlier checkpoints of the run are to be ignored.

    Raises:
        UserError: If a checkpoint and `--fresh` are both asked for, the checkpoint is not there, or all are damaged.
    """
    if asked and fresh:
        raise UserError("choose one of `--ckpt_path` (start from that file) and `--fresh` (start from nothing).")
    if asked and asked != "last":
        if not Path(asked).exists():
            raise UserError(f"expected a checkpoint at '{asked}', found none. {_list_checkpoints(run)}")
        return asked
    if fresh:
        return None
    found = newest_valid(run / CHECKPOINT_FOLDER)
    if asked == "last" and found is None:
        last = run / CHECKPOINT_FOLDER / LAST_CHECKPOINT
        raise UserError(f"expected a checkpoint at '{last}', found none. {_list_checkpoints(run)}")
    return None if found is None else str(found)


def set_aside(run: Path, config: dict[str, Any], fresh: bool) -> None:
    """Moves records and results of an earlier run into `old<n>/`.

    A run that begins anew never extends them, and no later stage takes old results for its own.

    Args:
        run: The run directory.
        config: Of the run that begins; what it reads stays.
        fresh: Whether that was asked for; else records without a result stay, of a run that was stopped early on.
    """
    read = {Path(value).resolve() for value in _result_settings(config).values() if isinstance(value, str)}
    names = dict.fromkeys((*RUN_RECORDS, *_declared_outputs(run)))
    records = [run / name for name in names if (run / name).exists() and (run / name).resolve() not in read]
    if not records or not (fresh or any(record.name in RESULTS for record in records)):
        return
    number = 1
    while (aside := run / f"old{number}").exists():
        number += 1
    aside.mkdir()
    for record in records:
        record.rename(aside / record.name)
    _log.info("records of the earlier run moved to %s", aside)


def _declared_outputs(run: Path) -> list[str]:
    """Returns the entries of a run directory that its last run was to write."""
    try:
        earlier = read_yaml((run / CONFIG_FILE).read_text(encoding="utf-8"))
        callbacks = earlier["trainer"]["callbacks"]
        outputs = [name for each in callbacks for name in each.get("init_args", {}).get("outputs", ())]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return []
    first = [Path(name).parts[:1] for name in outputs if isinstance(name, str)]
    return [part[0] for part in first if part and part[0] not in ("..", "/")]


def refuse_changed_config(run: Path, config: dict[str, Any], plan_by_content: bool) -> None:
    """Compares a run that is about to continue with the config it was started with.

    Only what defines the result counts: model, data, seed, some settings of the trainer, and callbacks that decide what
    learns or grows. Steps, loggers and devices may change.

    Args:
        run: Directory of the run that the checkpoint belongs to.
        config: Of the run that is about to continue.
        plan_by_content: Whether the checkpoint tells its plan, so that the place of the file does not matter.

    Raises:
        UserError: If they differ; names the keys with both values.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        _log.warning("%s is missing: cannot tell whether the run continues with the settings it began with", path)
        return
    try:
        earlier = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the earlier run's config is not valid YAML. Start again with `--fresh`.") from error
    if not isinstance(earlier, dict):
        raise UserError(f"{path}: the earlier run's config holds no settings. Start again with `--fresh`.")
    ignored = (*SPEED_KEYS, "plan") if plan_by_content else SPEED_KEYS
    if found := compare_configs(earlier, config, ignored):
        raise UserError(
            f"{run} holds a run that was started with other settings: {told(found)}. Use another "
            "`trainer.default_root_dir`, or `--fresh` to start this one again."
        )


def compare_configs(earlier: dict[str, Any], now: dict[str, Any], ignored: Sequence[str] = SPEED_KEYS) -> list[str]:
    """Returns one phrase for each setting that defines the result and differs, but for keys to be ignored."""
    before, after = (
        {key: value for key, value in _result_settings(each).items() if key.rsplit(".", 1)[-1] not in ignored}
        for each in (earlier, now)
    )
    return differences(before, after)


def _result_settings(config: dict[str, Any]) -> dict[str, Any]:
    settings = {section: config.get(section) for section in RESULT_SECTIONS}
    trainer = config.get("trainer") or {}
    settings["trainer"] = {name: trainer.get(name) for name in TRAINER}
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        arguments = (callback.get("init_args") or {}) if isinstance(callback, dict) else {}
        if any(name in arguments for name in PLAN_ARGUMENTS):
            settings[callback["class_path"].rsplit(".", 1)[-1]] = arguments
    return flatten(settings)


def _list_checkpoints(run: Path) -> str:
    found = sorted(str(path) for path in (run / CHECKPOINT_FOLDER).glob("*.ckpt"))
    return f"This run has: {', '.join(found)}." if found else f"The run directory {run} has no checkpoint either."
