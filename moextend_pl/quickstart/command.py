"""`python -m moextend_pl quickstart`: the whole method on real pictures, from nothing, in minutes.

Every step leaves files and a receipt. A step whose receipt and outputs are valid is skipped; one that
was interrupted goes on where it stopped; one whose configuration changed starts anew, and so do all
steps after it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from moextend_pl.cli.commands import run
from moextend_pl.cli.recipes import HOME
from moextend_pl.quickstart import report
from moextend_pl.quickstart.next_steps import next_commands
from moextend_pl.quickstart.runner import Recipe, Step, run_recipe

log = logging.getLogger(__name__)


def _data(folder: Path) -> None:
    run(["shards", "build", "easy-vqa", "--out", str(folder)])


STEPS = (
    Step("data", "shards from easy-VQA: captions, questions about pictures, questions about text", 0.01, _data),
    Step("0_vision", "a tiny vision tower learns to match pictures and captions", 0.06),
    Step("0_language", "a tiny mixture-of-experts model learns to answer questions about text", 0.20),
    Step("1_align", "the projector learns to put pictures into the model's words", 0.04),
    Step("2_probe", "the routers learn for a moment; the layers that shift most are chosen", 0.02),
    Step("3_extend", "new experts learn to answer questions about pictures", 0.25),
    Step("report", "the extended model answers the official test split", 0.11),
    Step("full_finetune", "the baseline: the whole language model learns instead", 0.26),
    Step("report_full", "the baseline answers the same questions", 0.05),
)
RECIPE = Recipe(
    command="quickstart",
    configs=HOME / "easy_vqa",
    out="runs/quickstart",
    steps=STEPS,
    baselines=("full_finetune", "report_full"),
    report=report.write,
    reports=("report", "report_full"),
)


def main(argv: Sequence[str]) -> int:
    """Runs the quickstart."""
    out = run_recipe(RECIPE, (__doc__ or "").split("\n")[0], argv)
    if out is not None:
        log.info("the report is in %s; what you can do now:", out / report.REPORT)
        for purpose, line in next_commands(out):
            log.info("  # %s\n    %s", purpose, line)
    return 0
