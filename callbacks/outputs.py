"""What a stage writes when it ends."""

from __future__ import annotations

import logging
import resource
import time
from typing import Any

from lightning.pytorch import Callback, Trainer

from moextend_pl.contracts import UserError, run_directory
from moextend_pl.models.delta import save_delta
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.model_folder import is_like_mixtral
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.atomic import write_folder, write_json
from moextend_pl.runs.checkpoint import CHECKPOINT_FOLDER, PENDING_CHECKPOINT, take_place
from moextend_pl.runs.fingerprints import file_sha256
from moextend_pl.training.sharding.strategy import sharded

log = logging.getLogger(__name__)
RECEIPT = "stage.json"
_NOT_TRANSFORMERS = (
    "SavePretrained cannot write an {} language model: transformers would read the folder with random weights. Train "
    "it as part of a moextend_pl.MoExtend with SaveDelta, or leave out `{}`."
)


class SaveDelta(Callback):
    """Writes the new weights and the manifest when training ends."""

    def setup(self, trainer: Trainer, pl_module: MoExtend, stage: str) -> None:
        """Refuses a part that is trained alone, before it is built."""
        if not isinstance(pl_module, MoExtend):
            raise UserError(
                f"SaveDelta writes what a moextend_pl.MoExtend has learned, got {type(pl_module).__name__}. Use "
                "SavePretrained."
            )

    def on_train_end(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Writes `delta.safetensors` and `manifest.json`."""
        if trainer.is_global_zero or sharded(pl_module) is not None:
            save_delta(pl_module, run_directory(trainer), writes=trainer.is_global_zero)


class SavePretrained(Callback):
    """Writes a whole tower or language model when training ends; an upcycled Llama or Mistral as a Mixtral.

    Args:
        folder: Name of the folder inside the run directory.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: VisionEncoder | MoELanguageModel, stage: str) -> None:
        """Refuses a model that cannot be written, before it is built."""
        if isinstance(pl_module, MoELanguageModel) and pl_module.compute.quantize is not None:
            raise UserError("SavePretrained cannot write a 4-bit model. Remove `quantize`, or use SaveDelta.")
        if sharded(pl_module) is not None:
            raise UserError(
                "SavePretrained writes a whole model, of which each process holds a part where weights are shared. Use "
                "`trainer.strategy: ddp`, or train it as part of a moextend_pl.MoExtend with SaveDelta."
            )
        if not hasattr(pl_module, "save_pretrained"):
            raise UserError(f"SavePretrained writes a tower or a language model, got {type(pl_module).__name__}.")
        spec = pl_module.upcycle_spec if isinstance(pl_module, MoELanguageModel) else None
        if isinstance(pl_module, MoELanguageModel) and spec and not is_like_mixtral(pl_module.model_config(), spec):
            raise UserError(_NOT_TRANSFORMERS.format("upcycled", "language.upcycle"))

    def on_fit_start(self, trainer: Trainer, pl_module: VisionEncoder | MoELanguageModel) -> None:
        """Refuses an extended language model, before its first step."""
        if isinstance(pl_module, MoELanguageModel) and pl_module.extensions:
            raise UserError(_NOT_TRANSFORMERS.format("extended", "ExpertExtension.plan"))

    def on_train_end(self, trainer: Trainer, pl_module: VisionEncoder | MoELanguageModel) -> None:
        """Writes the folder."""
        if trainer.is_global_zero:
            write_folder(run_directory(trainer) / self.folder, pl_module.save_pretrained)


class StageReceipt(Callback):
    """Writes `stage.json` when training ends: steps, seconds, and the SHA-256 of every output.

    Put it last: a run directory with a receipt is a finished stage, and its outputs can be checked.
    Seconds are training time, summed over restarts.

    Args:
        outputs: Files of the run directory, or folders of it with all their files.
    """

    def __init__(self, outputs: list[str]) -> None:
        self.outputs = outputs
        self._seconds = 0.0
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Keeps the seconds spent so far."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the seconds of earlier starts."""
        self._seconds = float(state_dict["seconds"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: MoExtend, checkpoint: dict[str, Any]) -> None:
        """Refuses to end at once with nothing written: an unfinished stage that is past the steps it is asked for.

        Raises:
            UserError: If no step is left to do, and no receipt tells that the stage was finished.
        """
        steps, run = checkpoint["global_step"], run_directory(trainer)
        if trainer.state.fn == "fit" and steps >= trainer.max_steps and not (run / RECEIPT).exists():
            raise UserError(
                f"Expected `trainer.max_steps` above {steps}, the step of the checkpoint that this run goes on from, "
                f"got {trainer.max_steps}: nothing would be trained, and no result written. Raise it."
            )

    def _elapsed(self) -> float:
        return self._seconds + (time.monotonic() - self._started if self._started else 0.0)

    def on_fit_start(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Writes the receipt, and then the final checkpoint, which ends the stage for good."""
        if trainer.is_global_zero:
            self._write(trainer)
        final = run_directory(trainer) / CHECKPOINT_FOLDER / PENDING_CHECKPOINT
        trainer.save_checkpoint(final)
        if trainer.is_global_zero:
            take_place(final)

    def _write(self, trainer: Trainer) -> None:
        run = run_directory(trainer)
        places = [run / name for name in self.outputs]
        files = sorted(f for p in places for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file())
        data = {
            "steps": trainer.global_step,
            "seconds": round(self._elapsed(), 2),
            "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
            "outputs": {str(file.relative_to(run)): file_sha256(file) for file in files},
        }
        write_json(run / RECEIPT, data)
