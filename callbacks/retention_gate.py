"""Measures on given texts, while a model learns, what it still knows, and stops the run at a limit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from moextend_pl.contracts import UserError, run_directory
from moextend_pl.evaluation.retention import Knowledge, closed_logits, evaluating, extended_logits, know
from moextend_pl.evaluation.retention_texts import TextSet, read_all_texts
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.atomic import write_json

log = logging.getLogger(__name__)
RETENTION_FILE = "retention_in_training.json"
NUMBERS = ("perplexity", "accuracy", "accuracy_norm")


class RetentionGate(Callback):
    """Logs `retention/TEXTS_perplexity` and `_accuracy` while a model learns, and stops the run at a limit.

    Every rank measures all texts, so keep them short: 20,000 tokens say enough. The base is what the model knows before
    the first step. A run that is stopped writes its results as one that has ended.

    Args:
        texts: Files, `.txt` or `.jsonl` as `evaluate --retention` takes them.
        every_n_steps: Steps between two measurements; the last step is measured too.
        max_perplexity_rise: Stop where a perplexity is above the base's by more than this share, for example 0.02; None
            never stops.
        max_accuracy_drop: Stop where an accuracy is below the base's by more than this, for example 0.01; None never
            stops.
    """

    def __init__(
        self,
        texts: list[str],
        every_n_steps: int = 500,
        max_perplexity_rise: float | None = None,
        max_accuracy_drop: float | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise UserError(f"Expected `every_n_steps` of RetentionGate of at least 1, got {every_n_steps}.")
        for name, limit in (("max_perplexity_rise", max_perplexity_rise), ("max_accuracy_drop", max_accuracy_drop)):
            if limit is not None and not 0 <= limit < float("inf"):
                raise UserError(f"Expected `{name}` of RetentionGate of at least 0, got {limit}.")
        self.files, self.every_n_steps = [Path(text) for text in texts], every_n_steps
        self.max_perplexity_rise, self.max_accuracy_drop = max_perplexity_rise, max_accuracy_drop
        self._texts: list[TextSet] = []
        self._base: dict[str, dict[str, float]] = {}
        self._history: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Keeps what the base knew, which a resumed run can no longer measure, and the curve so far."""
        return {"base": self._base, "history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over both."""
        self._base, self._history = state_dict["base"], list(state_dict["history"])

    def setup(self, trainer: Trainer, pl_module: MoExtend, stage: str) -> None:
        """Reads the texts, before any weight is read.

        Raises:
            UserError: If a file cannot be read, two have one name, or the module has no language model to measure.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, MoExtend):
            raise UserError(
                f"RetentionGate measures a moextend_pl.MoExtend, got {type(pl_module).__name__}. Remove it."
            )
        self._texts = read_all_texts(self.files)

    def on_train_start(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Measures the base, once in the life of a run; a run that was stopped at a limit is not taken further."""
        if not self._base:
            self._base = self._measure(trainer, pl_module, closed=True)
        if self._history:
            self._stop(trainer, {name: self._history[-1][name] for name in self._base})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: MoExtend, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures at its steps."""
        step = trainer.global_step
        last = self._history[-1]["step"] if self._history else 0
        if step > last and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self._judge(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Writes `retention_in_training.json`: the base and the curve."""
        if trainer.is_global_zero:
            write_json(run_directory(trainer) / RETENTION_FILE, self.state_dict())

    def _measure(self, trainer: Trainer, module: MoExtend, closed: bool = False) -> dict[str, dict[str, float]]:
        language, found = module.language, {}
        logits = closed_logits(language) if closed else extended_logits(language)
        with evaluating(module), trainer.precision_plugin.forward_context():
            for texts in self._texts:
                found[texts.name] = _numbers(know(texts, language.tokenizer, logits, module.device))
        return found

    def _judge(self, trainer: Trainer, module: MoExtend) -> None:
        found = self._measure(trainer, module)
        self._history.append({"step": trainer.global_step, **found})
        values = {f"retention/{name}_{key}": v for name, numbers in found.items() for key, v in numbers.items()}
        module.log_dict(values, batch_size=1)
        self._stop(trainer, found)

    def _stop(self, trainer: Trainer, found: dict[str, dict[str, float]]) -> None:
        complaints = self._complaints(found)
        # All ranks or none, whatever a last digit says on one of them.
        if trainer.strategy.reduce_boolean_decision(bool(complaints), all=False):
            trainer.should_stop = True
            log.warning("the run stops at step %d: %s", trainer.global_step, "; ".join(complaints) or "told by a rank")

    def _complaints(self, found: dict[str, dict[str, float]]) -> list[str]:
        """Returns what is beyond a limit, in words."""
        said = []
        for name, numbers in found.items():
            base = self._base[name]
            if self.max_perplexity_rise is not None and "perplexity" in numbers:
                limit = base["perplexity"] * (1 + self.max_perplexity_rise)
                # Not by `>`, which NaN would pass.
                if not numbers["perplexity"] <= limit:
                    said.append(f"perplexity of {name} is {numbers['perplexity']:.4f}, above {limit:.4f}")
            if self.max_accuracy_drop is not None and "accuracy" in numbers:
                limit = base["accuracy"] - self.max_accuracy_drop
                if numbers["accuracy"] < limit - 1e-9:
                    said.append(f"accuracy of {name} is {numbers['accuracy']:.4f}, below {limit:.4f}")
        return said


def _numbers(known: Knowledge) -> dict[str, float]:
    return {name: getattr(known, name) for name in NUMBERS if getattr(known, name) is not None}
