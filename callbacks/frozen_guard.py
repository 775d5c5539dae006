"""Proves that what is frozen stays as it was, bit for bit."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, Trainer

from moextend_pl.contracts import UserError, run_directory
from moextend_pl.runs.atomic import write_json
from moextend_pl.runs.fingerprints import frozen_tensors, tensor_sha256
from moextend_pl.training.stage import StageModule

log = logging.getLogger(__name__)
RECEIPT = "frozen.json"


class FrozenGuard(Callback):
    """Takes the SHA-256 of every frozen tensor before and after training; a difference is an error.

    A resumed run compares with the first start of the run, not with its own. Writes `frozen.json`
    with the number of tensors and whether they are unchanged. Put it before the callbacks that save.
    """

    def __init__(self) -> None:
        self._before: dict[str, str] = {}

    def state_dict(self) -> dict[str, Any]:
        """Keeps the fingerprints of the first start."""
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the fingerprints of the first start."""
        self._before = dict(state_dict["before"])

    def on_fit_start(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Takes the fingerprints, or compares with those of the first start."""
        now = {name: tensor_sha256(tensor) for name, tensor in frozen_tensors(pl_module).items()}
        changed = _changed(self._before or now, now)
        if changed:
            raise UserError(
                f"{len(changed)} of {len(now)} frozen tensors are not those that this run began with, for example "
                f"{changed[0]}: the base or an earlier stage has changed. Restore it, or begin anew with `--fresh`."
            )
        self._before = now

    def on_train_end(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Compares, and writes the receipt."""
        now = {name: tensor_sha256(tensor) for name, tensor in frozen_tensors(pl_module).items()}
        changed = _changed(self._before, now)
        if changed:
            raise RuntimeError(
                f"{len(changed)} of {len(now)} frozen tensors changed, for example {changed[:3]}. Nothing may write "
                "to a frozen tensor; the result of this run is not to be trusted."
            )
        if trainer.is_global_zero:
            write_json(run_directory(trainer) / RECEIPT, {"unchanged": True, "tensors": len(now)})
            log.info("all %d frozen tensors are unchanged", len(now))


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
