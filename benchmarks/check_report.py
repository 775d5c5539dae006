"""Does a quickstart reach what the project promises? Times are printed, not judged.

    python benchmarks/check_report.py runs/quickstart/report.json

Prints one row for each promise; exit code 1 if one is broken or a key is missing.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REQUIRED = (
    "vqa_accuracy",
    "vqa_accuracy_aligned",
    "text_accuracy_base",
    "text_accuracy_extended",
    "text_logits_identical",
    "frozen_unchanged",
    "trainable_parameters",
    "total_parameters",
    "layers",
    "source_experts",
    "seconds",
    "full_finetune",
)
REQUIRED_BASELINE = ("vqa_accuracy", "text_accuracy", "seconds")
MINIMUM = 0.97


def promises(report: dict[str, Any]) -> list[tuple[str, Any, str, Callable[[Any, Any], bool], Any]]:
    """Returns (key, value, relation in words, relation, bound) of every promise."""
    return [
        ("vqa_accuracy", report["vqa_accuracy"], ">=", operator.ge, MINIMUM),
        ("text_accuracy_base", report["text_accuracy_base"], ">=", operator.ge, MINIMUM),
        ("text_accuracy_extended", report["text_accuracy_extended"], "==", operator.eq, report["text_accuracy_base"]),
        ("text_logits_identical", report["text_logits_identical"], "is", operator.is_, True),
        ("frozen_unchanged", report["frozen_unchanged"], "is", operator.is_, True),
    ]


def check(report: dict[str, Any]) -> list[str]:
    """Returns one sentence for each missing key or broken promise."""
    missing = [key for key in REQUIRED if key not in report]
    baseline = report.get("full_finetune", {})
    missing += [f"full_finetune.{key}" for key in REQUIRED_BASELINE if key not in baseline]
    if missing:
        return [f"the report lacks {', '.join(missing)}"]
    return [
        f"{key} is {value}, expected {words} {bound}"
        for key, value, words, holds, bound in promises(report)
        if not holds(value, bound)
    ]


def main(argv: list[str]) -> int:
    """Prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    report = json.loads(parser.parse_args(argv).report.read_text(encoding="utf-8"))
    problems = check(report)
    for key in REQUIRED:
        print(f"{key:<24}{json.dumps(report.get(key))}")
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
