"""Progress of a stage: the time that is left, and how fast it learns."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor, TQDMProgressBar

from moextend_pl.contracts import Batch, UserError, run_directory
from moextend_pl.runs.atomic import read_json
from moextend_pl.runs.manifest import ROAD_FILE
from moextend_pl.samples.host_facts import samples_in, tokens_in


class StageProgress(TQDMProgressBar):
    """Lightning's progress bar over the steps of the whole stage, or of all stages where a command runs them in a row.

    Data is endless here and a stage has `max_steps`, so that the stock bar knows no total and no time left.
    """

    _before = 0

    @property
    def total_train_batches(self) -> int:
        """Batches of the whole stage."""
        return int(self.trainer.max_steps * self.trainer.accumulate_grad_batches)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Shows the total from the start, also where a run goes on in the middle of Lightning's epoch."""
        super().on_train_start()
        self._place(trainer)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Keeps it, where Lightning would begin anew."""
        super().on_train_epoch_start(trainer)
        self._place(trainer)

    def _place(self, trainer: Trainer) -> None:
        road, batches = read_json(run_directory(trainer) / ROAD_FILE), trainer.accumulate_grad_batches
        self._before = int(road.get("before", 0)) * batches
        bar = self.train_progress_bar
        bar.total = self._before + self.total_train_batches + int(road.get("after", 0)) * batches
        # Steps of the earlier start, and those of other stages, were not taken at this speed.
        bar.n = bar.initial = self._before + trainer.global_step * batches
        bar.set_description(str(road.get("stage") or "Training"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts from the first stage on."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, self._before + batch_idx)


class StageSpeed(ThroughputMonitor):
    """Samples and tokens a second, the share of tokens that are learned, and of the card's speed that is used (MFU).

    Lightning's monitor, which logs `train/device/items_per_sec` and others; `train/supervised_share` is that of the
    batch of the first process. MFU needs two numbers, since the operations of a token follow from the model and from
    what learns: `python -m moextend_pl plan` prints them, and `device/mfu` is their product with tokens a second over
    the card's speed.

    Args:
        window_size: Steps over which rates are taken.
        gflops_per_token: Operations of a token in a step, 10^9, as `plan` says; None for no MFU.
        peak_tflops: Dense operations a second of the card, 10^12; None for what Lightning knows of the card.
    """

    def __init__(
        self, window_size: int = 20, gflops_per_token: float | None = None, peak_tflops: float | None = None
    ) -> None:
        for name, value in (("gflops_per_token", gflops_per_token), ("peak_tflops", peak_tflops)):
            if value is not None and not value > 0:
                raise UserError(f"Expected `{name}` of StageSpeed above 0, got {value:g}. Correct it or leave it out.")
        super().__init__(samples_in, tokens_in, window_size=window_size)
        self.gflops_per_token = gflops_per_token
        self.peak_tflops = peak_tflops

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the speed of the card that is given, where Lightning would look it up."""
        super().setup(trainer, pl_module, stage)
        if self.peak_tflops is not None:
            for throughput in self._throughputs.values():
                throughput.available_flops = self.peak_tflops * 1e12

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Measures a batch."""
        tokens = tokens_in(batch)
        if self.gflops_per_token is not None:
            # where Lightning's monitor looks for it
            pl_module.flops_per_batch = self.gflops_per_token * 1e9 * tokens  # type: ignore[assignment]
        if "known" in batch:
            pl_module.log("train/supervised_share", len(batch["known"].learned) / max(tokens, 1))
        super().on_train_batch_end(trainer, pl_module, outputs, batch)
