"""Which experts the tokens of a stage choose while it learns."""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from callbacks.usage_report import Counts, count_selections, usage_lists
from moextend_pl.contracts import Batch, ExtensionPlan, UserError, run_directory
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.usage import ExpertUsage, RouterRecord, usage_shares
from moextend_pl.reports.plots import plot_usage
from moextend_pl.runs.metrics_log import GoesOn

USAGE_LOG = "expert_usage.jsonl"
PARTS = ("language", "encoder", "projector")
DEAD, OVERLOADED = 0.01, 2.0  # of the share that each expert would have if all were chosen alike


class UsageLog(Callback):
    """Counts which experts the tokens of training choose, every so many steps, and logs what they amount to.

    All loggers of the trainer (CSV, TensorBoard, W&B, MLflow) get, for each part that has experts, means over its
    layers: `PART/entropy` (1 if all experts are chosen alike, 0 if always one), `PART/dead` and `PART/overloaded`
    (share of experts below 1 % of that, or above twice of it), and `PART/new_image` and `PART/new_text` (share of
    the selections of image and text tokens that fall on new experts, in extended layers). Counts of every layer and
    expert go to `expert_usage.jsonl`, a line a step, of which `report` makes a picture.

    With `detail: layers` each layer has these numbers too, as `PART/layer_00/entropy`; with `detail: experts` also
    the share of the image and text tokens' selections that fall on each expert, as `PART/layer_00/expert_03/image`.
    Loggers of this project that take pictures get a heat map of layers and experts.

    A step that is not counted costs nothing, one that is counted waits for the device once.

    Args:
        every_n_steps: Optimizer steps between two counts.
        detail: What the loggers get: means over the layers (`parts`), also `layers`, or also `experts`.
        pictures_every: Counts between two heat maps; 0 for none.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        detail: Literal["parts", "layers", "experts"] = "parts",
        pictures_every: int = 10,
    ) -> None:
        for name, value, least in (("every_n_steps", every_n_steps, 1), ("pictures_every", pictures_every, 0)):
            if value < least:
                raise UserError(f"Expected `{name}` of UsageLog of at least {least}, got {value}. Correct it.")
        self.every_n_steps = every_n_steps
        self.detail = detail
        self.pictures_every = pictures_every
        self._usage: dict[str, ExpertUsage] = {}
        self._open = ExitStack()
        self._records: dict[str, list[RouterRecord]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a module without a language model.

        Raises:
            UserError: If it is a part alone.
        """
        if stage == "fit" and not isinstance(pl_module, MoExtend):
            name = type(pl_module).__name__
            raise UserError(f"UsageLog watches a moextend_pl.MoExtend, got {name}. Remove it from `trainer.callbacks`.")

    def on_train_start(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Makes a counter for each part that has experts."""
        sizes: dict[str, dict[int, int]] = {name: dict(getattr(pl_module, name).num_experts) for name in PARTS}
        self._usage = {name: ExpertUsage(size).to(pl_module.device) for name, size in sizes.items() if size}
        path = run_directory(trainer) / USAGE_LOG
        if trainer.is_global_zero and path.is_file():  # the line that a kill cut off would swallow the next
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: MoExtend, batch: Batch, batch_idx: int) -> None:
        """Listens to the routers in the steps that are counted."""
        if (trainer.global_step + 1) % self.every_n_steps == 0:
            self._records = {
                name: self._open.enter_context(getattr(pl_module, name).watch.recording()) for name in self._usage
            }
            self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: MoExtend, loss: Tensor) -> None:
        """Counts, and no longer listens: activations that are computed again would be counted twice."""
        self._open.close()
        for name, records in self._records.items():
            count_selections(self._usage[name], name, records, pl_module, self._batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: MoExtend, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Logs and writes the counts of a step when its last batch is through."""
        counted, self._records = bool(self._records), {}
        if not counted or trainer.global_step % self.every_n_steps:
            return  # more batches of this step are to come
        grown = new_experts(pl_module.plans)
        row: dict[str, Any] = {"step": trainer.global_step, "new": {str(n): count for n, count in grown.items()}}
        values: dict[str, float] = {}
        for name, usage in self._usage.items():
            counts = {kind: {n: c.cpu() for n, c in layers.items()} for kind, layers in usage.compute().items()}
            usage.reset()
            found = details(counts, grown if name == "language" else {}, self.detail)
            values |= {f"{name}/{what}": value for what, value in found.items()}
            row[name] = usage_lists(counts)
            self._show(trainer, name, counts)
        for logger in trainer.loggers:  # not by `log`, which passes on only what falls on a step that is logged
            logger.log_metrics(values, step=trainer.global_step - 1)  # as Lightning counts
        if trainer.is_global_zero:
            run_directory(trainer).mkdir(parents=True, exist_ok=True)
            with (run_directory(trainer) / USAGE_LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _show(self, trainer: Trainer, name: str, counts: Counts) -> None:
        """Gives a heat map to the loggers that take pictures, now and then."""
        takers = [logger for logger in trainer.loggers if isinstance(logger, GoesOn)]
        due = self.pictures_every and trainer.global_step // self.every_n_steps % self.pictures_every == 0
        if not (takers and due and trainer.is_global_zero):
            return
        stream = io.BytesIO()
        plot_usage({f"{name}, step {trainer.global_step}": counts}, stream)
        for logger in takers:
            logger.log_picture(f"{name}/usage", Image.open(stream).convert("RGB"), trainer.global_step - 1)


def new_experts(plans: Sequence[ExtensionPlan]) -> dict[int, int]:
    """Returns how many experts of each extended layer the base does not have; they are the last ones."""
    found: Counter[int] = Counter()
    for plan in plans:
        for growth in plan.layers:
            found[growth.layer] += len(growth.sources)
    return dict(found)


def summary(counts: Counts, grown: Mapping[int, int]) -> dict[str, float]:
    """Returns what the counts of a part amount to, as means over its layers; nothing of layers that saw no token.

    Args:
        counts: (E,) selections by token kind (`image`, `text`, `all`) and layer.
        grown: How many experts of a layer, its last ones, are new.
    """
    shares = [usage_shares(count) for count in counts["all"].values() if count.any()]
    found = {
        "entropy": [float(torch.special.entr(share).sum() / math.log(len(share))) for share in shares],
        "dead": [float((share * len(share) < DEAD).double().mean()) for share in shares],
        "overloaded": [float((share * len(share) > OVERLOADED).double().mean()) for share in shares],
    }
    for kind in ("image", "text"):
        seen = {layer: usage_shares(counts[kind][layer]) for layer in grown if counts[kind][layer].any()}
        found[f"new_{kind}"] = [float(share[-grown[layer] :].sum()) for layer, share in seen.items()]
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def details(counts: Counts, grown: Mapping[int, int], detail: str) -> dict[str, float]:
    """Returns what `summary` does, and as much of each layer and expert as is asked for.

    Args:
        counts: As there.
        grown: As there.
        detail: `parts`, `layers` or `experts`.
    """
    found = summary(counts, grown)
    for layer in counts["all"] if detail != "parts" else ():
        place = f"layer_{layer:02d}"  # letters that every service takes, in an order that it sorts by
        alone = {kind: {layer: layers[layer]} for kind, layers in counts.items()}
        own = {n: count for n, count in grown.items() if n == layer}
        found |= {f"{place}/{what}": value for what, value in summary(alone, own).items()}
        for kind in ("image", "text") if detail == "experts" else ():
            if counts[kind][layer].any():
                shares = usage_shares(counts[kind][layer]).tolist()
                found |= {f"{place}/expert_{expert:02d}/{kind}": share for expert, share in enumerate(shares)}
    return found
