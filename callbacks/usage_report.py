"""Measures which experts the tokens of a run choose, and draws it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from moextend_pl.contracts import Batch, UserError, run_directory
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.usage import ExpertUsage, RouterRecord
from moextend_pl.reports.plots import plot_usage
from moextend_pl.runs.atomic import write_json
from moextend_pl.samples.host_facts import is_image
from moextend_pl.samples.packing import sample_tokens
from moextend_pl.training.losses import sum_over_ranks

USAGE_FILE = "usage.json"
Counts = dict[str, dict[int, Tensor]]


def check_validation_set(trainer: Trainer) -> None:
    """Refuses a run without a validation set: all counts would be 0, and look like a measurement.

    Raises:
        UserError: If the datamodule of the run has none.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    # Not by truth value, which asks a loader for a length that it may not have.
    if data is None or data.val_dataloader() in (None, []):
        raise UserError(
            "Expected a validation set, on which expert usage is measured, got none. Set `val` of the data module."
        )


@torch.no_grad()
def measure_parts(trainer: Trainer, module: MoExtend) -> dict[str, Counts]:
    """Counts the selections of every expert of every part over the validation set of the run.

    Args:
        trainer: Its datamodule brings the validation set; each rank takes its share of it.
        module: The model, as it is now.

    Returns:
        By part (`language`, and `encoder` and `projector` where they have experts) counts (E,) on the CPU
        by token kind (`image`, `text`, `all`) and layer, summed over ranks.

    Raises:
        UserError: If a router gave NaN; on all ranks.
    """
    parts: dict[str, Any] = {"language": module.language, "encoder": module.encoder, "projector": module.projector}
    experts = {name: part.num_experts for name, part in parts.items() if part.num_experts}
    usage = {name: ExpertUsage(layers).to(module.device) for name, layers in experts.items()}
    # One by one: a frozen tower stays in evaluation mode while the rest of the model learns.
    modes = {part: part.training for part in module.modules()}
    module.eval()
    unsure = torch.zeros((), device=module.device)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    for batch in data.val_dataloader():
        batch = module.transfer_batch_to_device(module.with_host_facts(batch), module.device, 0)
        with ExitStack() as stack:
            # As in the steps of the run, whose cache keeps the features of a frozen tower.
            stack.enter_context(trainer.precision_plugin.forward_context())
            records = {name: stack.enter_context(parts[name].watch.recording()) for name in experts}
            module.language(batch, module.embed(batch), batch["known"])
        for name, found in records.items():
            unsure += sum(record.logits.isnan().any() for record in found)
            count_selections(usage[name], name, found, module, batch)
    for part, mode in modes.items():
        part.training = mode
    if bool(sum_over_ranks(unsure)):
        raise UserError(
            "Expected routers that choose experts on the validation set, got NaN as their scores: no usage can be "
            "measured. Look at its samples and at `optim.lr`."
        )
    return {name: _on_cpu(metric.compute()) for name, metric in usage.items()}


def count_selections(
    usage: ExpertUsage, part: str, records: list[RouterRecord], module: MoExtend, batch: Batch
) -> None:
    """Adds what the routers of one part did in one pass over a batch, which asks the device for nothing.

    Args:
        usage: Counts of the part.
        part: `language`, whose tokens are of images or text; or `encoder` or `projector`, whose tokens are of images.
        records: One for each pass of a router.
        module: The model.
        batch: As it came to the device.
    """
    if part == "language":
        is_image_T = is_image(batch, module.language.image_token_id).reshape(-1)
        usage.update(records, is_image_T, sample_tokens(batch).reshape(-1))
        return
    for record in records:  # scales of a tower differ in their number of tokens
        every_T = torch.ones(len(record.indices), dtype=torch.bool, device=record.indices.device)
        usage.update([record], every_T, every_T)


def _on_cpu(counts: Counts) -> Counts:
    return {kind: {layer: c.cpu() for layer, c in layers.items()} for kind, layers in counts.items()}


def measure_usage(trainer: Trainer, module: MoExtend) -> Counts:
    """Counts the selections of every expert of the language model; see `measure_parts`."""
    return measure_parts(trainer, module)["language"]


def usage_lists(counts: Counts) -> dict[str, dict[str, list[int]]]:
    """Returns counts as plain lists, ready for JSON or YAML."""
    return {kind: {str(layer): c.tolist() for layer, c in layers.items()} for kind, layers in counts.items()}


class UsageReport(Callback):
    """Writes `usage.json` and `plots/usage*.png` when training ends, new and upcycled experts included.

    `usage.json` has the counts of the language model under `end`, those of an upcycled tower and
    projector under `encoder` and `projector`.
    """

    def setup(self, trainer: Trainer, pl_module: MoExtend, stage: str) -> None:
        """Refuses a run that has nothing to measure on, before it trains."""
        if stage == "fit":
            check_validation_set(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Measures and writes."""
        parts = measure_parts(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        run = run_directory(trainer)
        names = {"language": "end"}
        write_json(run / USAGE_FILE, {names.get(name, name): usage_lists(counts) for name, counts in parts.items()})
        for name, counts in parts.items():
            file = "usage.png" if name == "language" else f"usage_{name}.png"
            plot_usage({f"{name} after training": counts}, run / "plots" / file)
