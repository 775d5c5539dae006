"""One run of a study, in a process of its own: `python -m ablation.work fit CONFIG | data ARGUMENTS`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from moextend_pl.cli.commands import EXIT_USER_ERROR, run
from moextend_pl.contracts import UserError
from moextend_pl.quickstart.report import measure_open_routing, measure_stage
from moextend_pl.runs.atomic import write_json

MEASURES = "measures.json"


def measure(config: Path) -> dict[str, Any]:
    """Lets a finished run answer its test sets.

    Args:
        config: Stage file of the run.

    Returns:
        Accuracy by set; `text_open` where no text is kept from what learned; parameters and layers of a grown model.
    """
    accuracies, command = measure_stage(config)
    model, plan = command.model, command.model.extension_plan
    found: dict[str, Any] = {**accuracies, "finite": all_finite(model)}
    learning = [p for p in model.parameters() if p.requires_grad]
    found["trained_parameters"] = sum(p.numel() for p in learning)
    if plan is not None:
        parts = model.parts()
        new = [p for part in ("new_experts", "new_routers", "calibration") for p in parts[part]]
        found["new_parameters"] = sum(p.numel() for p in new)
        found["layers"] = [growth.layer for growth in plan.layers]
        found["sources"] = [list(growth.sources) for growth in plan.layers]
    if "text" in accuracies:
        masked = plan is not None and plan.routing != "open"
        found["text_open"] = measure_open_routing(command) if masked else accuracies["text"]
    return found


def all_finite(model: torch.nn.Module) -> bool:
    """Returns whether no parameter has become infinite or no number."""
    return all(math.isfinite(float(p.detach().sum())) for p in model.parameters())


def main(argv: list[str]) -> int:
    """Runs one stage, and measures it if asked to; returns the exit code."""
    kind, argument, *options = argv
    torch.set_num_threads(1)
    try:
        if kind == "data":
            run(json.loads(Path(argument).read_text(encoding="utf-8")))
            return 0
        command: Any = run(["fit", "--config", argument])
        if "measure" in options:
            write_json(Path(command.trainer.default_root_dir) / MEASURES, measure(Path(argument)))
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
