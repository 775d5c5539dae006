"""Test and predict by greedy generation: the same steps for every module that can answer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torchmetrics import MeanMetric

from moextend_pl.contracts import Batch


def exact_match(prediction: str, truth: str) -> bool:
    """Returns whether two answers are equal but for case and outer white space.

    Example:
        >>> exact_match(" Blue", "blue")
        True
    """
    return prediction.strip().lower() == truth.strip().lower()


class AnswerMixin(LightningModule):
    """Gives a module with `answer(batch) -> list[str]` its test and predict steps."""

    def answer(self, batch: Batch) -> list[str]:
        """Generates one answer for each prompt of the batch."""
        raise NotImplementedError

    def on_test_epoch_start(self) -> None:
        """Starts a count for each test set."""
        data: Any = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "test_names", ["test"])
        self._matches = {name: MeanMetric().to(self.device) for name in names}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Answers a batch and counts exact matches; fillers, whose key is empty, do not count."""
        rows = self.predict_step(batch, batch_idx, dataloader_idx)
        metric = list(self._matches.values())[dataloader_idx]
        for row in rows:
            metric.update(float(row["correct"]))
        return {"rows": rows}

    def on_test_epoch_end(self) -> None:
        """Logs `test/<set>_accuracy` of each test set."""
        for name, metric in self._matches.items():
            self.log(f"test/{name}_accuracy", metric.compute(), rank_zero_only=True)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Returns a row with key, prompt, answer, prediction and `correct` for each prompt."""
        rows = zip(batch["keys"], batch["prompts"], batch["answers"], self.answer(batch), strict=True)
        return [
            {"key": k, "prompt": p, "answer": a, "prediction": g, "correct": exact_match(g, a)}
            for k, p, a, g in rows
            if k
        ]
