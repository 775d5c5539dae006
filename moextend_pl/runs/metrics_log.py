"""The loggers of a run, which go on where it goes on: `metrics.csv`, TensorBoard, W&B and MLflow.

Lightning's own loggers work too, and begin a record of their own at every start.
"""

from __future__ import annotations

import csv
import os
import uuid
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image

from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import read_json, write_json

METRICS_FILE, TENSORBOARD_FOLDER, NAMES_FILE = "metrics.csv", "tensorboard", "loggers.json"
_ADVICE = 'Install it with `pip install "moextend_pl[loggers]"`, or leave {} out of `trainer.logger`.'


class _ContinuedWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Keeps what is there, where Lightning would delete it."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        try:
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = list(next(csv.reader(file), []))
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: not a table that a run can go on with ({error}). Move it away.") from error


class RunLogger(CSVLogger):
    """Writes `metrics.csv` into the run directory itself.

    A run that continues from a checkpoint takes some steps again; their rows stand twice, equal, and
    readers keep the last of each step.

    Args:
        save_dir: Run directory.
    """

    def __init__(self, save_dir: str) -> None:
        # At once: a run that is killed does not take the steps before its checkpoint again.
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of this process."""
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _ContinuedWriter(log_dir=self.log_dir)
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment


class GoesOn(Logger):
    """A logger with a place for each run, which takes no value of a step twice.

    Attributes:
        known: Name of a value -> last step of which an earlier start of the run has told it.
    """

    known: Mapping[str, int] = {}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Passes on what is new: a run that continues from a checkpoint takes some steps again."""
        new = {name: v for name, v in metrics.items() if step is None or step > self.known.get(name, -1)}
        if new:
            super().log_metrics(new, step)  # type: ignore[safe-super]

    @rank_zero_only
    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Adds a picture of a step, unless an earlier start did."""
        if step > max(self.known.values(), default=-1):
            self.show(name, picture, step)

    @abstractmethod
    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Adds a picture of a step."""


class TensorBoardRun(GoesOn, TensorBoardLogger):
    """Writes for TensorBoard into `tensorboard/` of the run directory.

    Args:
        run: Run directory; the command line puts `trainer.default_root_dir` here.
    """

    def __init__(self, run: str = ".") -> None:
        try:
            super().__init__(run, name="", version="", sub_dir=TENSORBOARD_FOLDER, default_hp_metric=False)
        except ModuleNotFoundError as error:
            raise UserError(f"{error}. {_ADVICE.format('TensorBoardRun')}") from error

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Adds a picture of a step."""
        self.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")


class WandbRun(GoesOn, WandbLogger):
    """Sends to W&B, or with `offline` writes for a later `wandb sync`, as one run of W&B for all starts of a run.

    Args:
        run: Run directory, whose name the run of W&B bears; the command line puts `trainer.default_root_dir` here.
        project: Of W&B; None for `WANDB_PROJECT`.
        offline: Whether nothing is sent.
        tags: Of the run of W&B.
    """

    def __init__(
        self, run: str = ".", project: str | None = None, offline: bool = False, tags: Sequence[str] = ()
    ) -> None:
        folder = Path(run)
        named = read_json(folder / NAMES_FILE).get("wandb") or uuid.uuid4().hex[:8]
        try:
            super().__init__(
                folder.absolute().name, run, version=named, offline=offline, project=project, tags=list(tags)
            )
        except ModuleNotFoundError as error:
            raise UserError(f"{error}. {_ADVICE.format('WandbRun')}") from error

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of W&B, whose name the run directory keeps."""
        Path(str(self.save_dir)).mkdir(parents=True, exist_ok=True)
        found = super().experiment
        _keep_name(Path(str(self.save_dir)), "wandb", str(self.version))
        return found

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the run of W&B, into which the next stage of this process would otherwise write."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Adds a picture of a step."""
        self.log_image(name, [picture], step)


class MLflowRun(GoesOn, MLFlowLogger):
    """Writes into an MLflow store, as one run of MLflow for all starts of a run.

    Args:
        run: Run directory, whose name the run of MLflow bears; the command line puts `trainer.default_root_dir` here.
        store: Address of the store; None for `MLFLOW_TRACKING_URI`, else `mlflow.db` in the run directory.
        experiment_name: Of MLflow.
    """

    def __init__(self, run: str = ".", store: str | None = None, experiment_name: str = "moextend_pl") -> None:
        folder = Path(run)
        self._folder, self._named = folder, read_json(folder / NAMES_FILE).get("mlflow")
        address, pictures = store or os.environ.get("MLFLOW_TRACKING_URI"), None
        if not address:
            folder.mkdir(parents=True, exist_ok=True)
            address, pictures = f"sqlite:///{folder.absolute() / 'mlflow.db'}", (folder / "mlflow").absolute().as_uri()
        try:
            super().__init__(
                experiment_name, folder.absolute().name, address, artifact_location=pictures, run_id=self._named
            )
        except ModuleNotFoundError as error:
            raise UserError(f"{error}. {_ADVICE.format('MLflowRun')}") from error

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The client of MLflow."""
        begins, client = not self._initialized, super().experiment
        if begins and self._named:
            client.update_run(self._run_id, "RUNNING")
        elif begins:
            _keep_name(self._folder, "mlflow", str(self._run_id))
        return client

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Adds the settings of a run that begins; MLflow lets nobody change them later."""
        if not self._named:
            super().log_hyperparams(params)

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Adds a picture of a step."""
        self.experiment.log_image(self.run_id, picture, key=name, step=step)


def last_steps(run: Path) -> dict[str, int]:
    """Returns the last step of each column of `metrics.csv`; nothing where a run has none.

    The highest one: a run that was killed while it took steps again ends with a lower one.
    """
    path, found = run / METRICS_FILE, dict[str, int]()
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = int(row["step"] or -1)
                found.update({name: max(step, found.get(name, -1)) for name, value in row.items() if value})
    return found


def _keep_name(run: Path, service: str, name: str) -> None:
    """Keeps what a service calls a run."""
    names = read_json(run / NAMES_FILE)
    if names.get(service) != name:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / NAMES_FILE, {**names, service: name})
