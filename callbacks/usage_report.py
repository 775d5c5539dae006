"""Measures which experts the tokens of a run choose, and draws it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from moextend_pl.checkpoint import write_json
from moextend_pl.contracts import run_directory
from moextend_pl.module import MoExtend
from moextend_pl.moe.usage import ExpertUsage
from moextend_pl.plots import plot_usage

USAGE_FILE = "usage.json"
Counts = dict[str, dict[int, Tensor]]


@torch.no_grad()
def measure_usage(trainer: Trainer, module: MoExtend) -> Counts:
    """Counts the selections of every expert over the validation set of the run.

    Args:
        trainer: Its datamodule brings the validation set; each rank takes its share of it.
        module: The model, as it is now.

    Returns:
        Counts (E,) on the CPU by token kind (`image`, `text`, `all`) and layer, summed over ranks.
    """
    usage = ExpertUsage(module.language.num_experts).to(module.device)
    # One by one: a frozen tower stays in evaluation mode while the rest of the model learns.
    modes = {part: part.training for part in module.modules()}
    module.eval()
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    for batch in data.val_dataloader():
        batch = module.transfer_batch_to_device(batch, module.device, 0)
        with module.language.recording() as records:
            module.language(batch, module.embed(batch), batch["labels"] >= 0)
        is_image_T = (batch["input_ids"] == module.language.image_token_id).reshape(-1)
        usage.update(records, is_image_T, batch["attention_mask"].reshape(-1).bool())
    for part, mode in modes.items():
        part.training = mode
    counts = usage.compute()
    return {kind: {layer: c.cpu() for layer, c in layers.items()} for kind, layers in counts.items()}


def usage_lists(counts: Counts) -> dict[str, dict[str, list[int]]]:
    """Returns counts as plain lists, ready for JSON or YAML."""
    return {kind: {str(layer): c.tolist() for layer, c in layers.items()} for kind, layers in counts.items()}


class UsageReport(Callback):
    """Writes `usage.json` and `plots/usage.png` when training ends, new experts included."""

    def on_train_end(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Measures and writes."""
        counts = measure_usage(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        run = run_directory(trainer)
        write_json(run / USAGE_FILE, {"end": usage_lists(counts)})
        plot_usage({"after training": counts}, run / "plots" / "usage.png")
