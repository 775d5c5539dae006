"""`metrics.csv` of a run, kept when the run continues after an interruption."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from moextend_pl.contracts import UserError


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
