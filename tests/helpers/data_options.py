"""Options of `ImageTextShards` side by side, as tests like to write them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from datamodules.options import EvaluationSpec, ReadingSpec, RowSpec

NAMES = {"eval_batch_size": ("evaluation", "batch_size"), "val_samples": ("evaluation", "samples")}
GROUPS: dict[str, Any] = {"rows": RowSpec, "evaluation": EvaluationSpec, "reading": ReadingSpec}
for group in ("rows", "reading"):
    NAMES |= {field.name: (group, field.name) for field in fields(GROUPS[group])}


def grouped(**options: Any) -> dict[str, Any]:
    """Returns the arguments of `ImageTextShards`, options of groups in their groups."""
    arguments = {name: value for name, value in options.items() if name not in NAMES}
    for group, kind in GROUPS.items():
        given = {NAMES[name][1]: value for name, value in options.items() if NAMES.get(name, ("",))[0] == group}
        if given:
            arguments[group] = kind(**given)
    return arguments
