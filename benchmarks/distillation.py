"""Is a student with a teacher better than one without, at equal steps? LLaVA-KD's three stages on easy-VQA.

    python benchmarks/distillation.py --quickstart runs/quickstart --out runs/distillation

The teacher is the model of a finished quickstart. A student's language model with a third of the parameters is trained
once. Then, for each seed, the stages of `configs/easy_vqa/distill` run without a teacher and with each preset: the same
start, samples, order and steps. All are asked the same official test questions. What is done is not done again, so the
same command goes on where it stopped. Prints means, and means of the paired differences with their 95 % intervals
(Student's t); `--write` puts them into `docs/distillation.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pages
import yaml
from ablation.planning import change
from lightning.pytorch import Trainer
from scipy.stats import ttest_1samp

from datamodules import ImageTextShards
from datamodules.options import RowSpec
from moextend_pl import Distill, LogitTerm, MoELanguageModel, Projector, TeacherSpec, VisionEncoder, cli
from moextend_pl.inference.spec import GenerationSpec
from moextend_pl.runs.atomic import write_json, write_text

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "easy_vqa" / "distill"
LANGUAGE, STAGES = "0_language", ("1_dpt", "2_sft", "3_dft")
ALONE, ARMS = "none", ("none", "llava_kd", "llavadi")
KL = "KL from the teacher"
MEASURES = {
    "cross-entropy of answers": "val/loss",
    "answer tokens that are right": "val/token_accuracy",
    "answers that are right": "test/vqa_accuracy",
    KL: "val/logits_forward_answer",
}
QUESTIONS, AT_ONCE = 1000, 500
Found = dict[str, dict[int, dict[str, float]]]  # measures by arm and seed


def run_stage(name: str, run: Path, places: dict[str, Any], settings: dict[str, Any]) -> None:
    """Runs a stage of the recipe into a folder, with values at dotted places, unless it is done."""
    if (run / "stage.json").is_file():
        return
    steps = settings["steps"][(LANGUAGE, *STAGES).index(name)]
    trainer = {"default_root_dir": str(run), "max_steps": steps, "limit_val_batches": 0, "enable_progress_bar": False}
    places = {**places, "data.init_args.batch_size": settings["batch"], "data.init_args.test": None}
    stage = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    stage["base"] = str(CONFIGS / stage["base"])
    for place, value in {**places, **{f"trainer.{key}": value for key, value in trainer.items()}}.items():
        change(stage, place, value)
    run.parent.mkdir(parents=True, exist_ok=True)
    config = run.with_name(f"{name}.yaml")
    write_text(config, yaml.safe_dump(stage, sort_keys=False))
    cli.run(["fit", "--config", str(config)])


def student_places(name: str, start: Path | None, arm: str, seed: int, quickstart: Path, base: Path) -> dict[str, Any]:
    """Returns what a stage of one arm and seed has at which dotted place; arms differ in the teacher alone.

    Args:
        name: The stage.
        start: Run that it goes on from.
        arm: Preset of the terms, or none.
        seed: Of the projector and of the order of samples.
        quickstart: Where teacher and data are.
        base: The student's language model.
    """
    data = quickstart / "data" / ("captions" if name == "1_dpt" else "vqa")
    places: dict[str, Any] = {f"data.init_args.{split}": str(data / split) for split in ("train", "val")}
    places |= {"seed_everything": seed, "data.init_args.rows.seed": seed}
    model = {"encoder.path": str(quickstart / "0_vision" / "encoder"), "language.base": str(base)}
    model["init_from"] = None if start is None else str(start)
    if name != "2_sft" and arm == ALONE:
        places["base"] = str(CONFIGS / "student.yaml")
    elif name != "2_sft":
        model |= {"teacher.run": str(quickstart / "3_extend"), "terms": arm}
        if arm == "llavadi":  # what maps its hidden states learns, too
            parts = ["projector"] if name == "1_dpt" else ["projector", "language", "routers"]
            places["trainer.callbacks+.TrainOnly.init_args.parts"] = [*parts, "distillation"]
    return places | {f"model.init_args.{place}": value for place, value in model.items()}


def measure(run: Path, base: Path, quickstart: Path, split: str) -> dict[str, float]:
    """Returns the measures of a finished student, asked the first questions of a split."""
    model = Distill(
        encoder=VisionEncoder(path=str(quickstart / "0_vision" / "encoder")),
        projector=Projector(kind="mlp2x_gelu"),
        language=MoELanguageModel(base=str(base), generation=GenerationSpec(max_new_tokens=8)),
        teacher=TeacherSpec(run=str(quickstart / "3_extend")),
        terms=[LogitTerm()],
        init_from=str(run),
    )
    asked = str(quickstart / "data" / "vqa" / split)
    data = ImageTextShards(val=asked, test={"vqa": asked}, rows=RowSpec(turns="single"), batch_size=AT_ONCE)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    batches = QUESTIONS // AT_ONCE
    trainer = Trainer(accelerator="cpu", limit_val_batches=batches, limit_test_batches=batches, **quiet)
    values = {**trainer.validate(model, data, verbose=False)[0], **trainer.test(model, data, verbose=False)[0]}
    return {name: float(values[key]) for name, key in MEASURES.items()}


def interval(values: list[float]) -> tuple[float, float, float]:
    """Returns the mean of values and its 95 % interval by Student's t, which has no ends for one value."""
    if len(values) < 2:
        return values[0], -math.inf, math.inf
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return statistics.fmean(values), float(low), float(high)


def table(found: Found) -> str:
    """Returns means by measure and arm, and paired differences from the arm without a teacher."""
    alone, taught = found[ALONE], [arm for arm in found if arm != ALONE]
    rows = []
    for name in MEASURES:
        row = [name, f"{statistics.fmean(values[name] for values in alone.values()):.4f}"]
        for arm in taught:
            own = statistics.fmean(values[name] for values in found[arm].values())
            mean, low, high = interval([values[name] - alone[seed][name] for seed, values in found[arm].items()])
            row += [f"{own:.4f}", f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"]
        rows.append(row)
    shares = ["the same as a share (geometric mean)", "1"]
    for arm in taught:
        logs = interval([math.log(values[KL] / alone[seed][KL]) for seed, values in found[arm].items()])
        shares += [f"{math.exp(logs[0]):.2f}", "({:.2f} to {:.2f})".format(*map(math.exp, logs[1:]))]
    columns = [f"{len(alone)} seeds", "no teacher", *(c for arm in taught for c in (f"`{arm}`", "difference (95 %)"))]
    return pages.grid(columns, [*rows, shares])


def main(argv: list[str] | None = None) -> None:
    """Trains what is not trained yet, measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="a finished quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(8)])
    parser.add_argument("--steps", type=int, nargs=4, default=[1100, 100, 175, 175], help="of language, DPT, SFT, DFT")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--split", choices=("val", "test"), default="test", help="val: to try settings")
    parser.add_argument("--write", action="store_true", help="put the table into docs/distillation.md")
    options = parser.parse_args(argv)
    out, quickstart = options.out.resolve(), options.quickstart.resolve()
    settings, told = {"steps": options.steps, "batch": options.batch, "split": options.split}, out / "settings.json"
    if told.is_file() and json.loads(told.read_text(encoding="utf-8")) != settings:
        parser.error(f"{out} holds runs of other settings; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(told, settings)
    words = {f"data.init_args.{split}": str(quickstart / "data" / "text" / split) for split in ("train", "val")}
    words["model.init_args.tokenizer"] = str(quickstart / "data" / "tokenizer")
    run_stage(LANGUAGE, out / LANGUAGE, words, {**settings, "batch": 64})
    base, found = out / LANGUAGE / "base", {arm: {} for arm in ARMS}
    for seed, arm in ((seed, arm) for seed in options.seeds for arm in ARMS):
        folder, start = out / f"seed{seed}" / arm, None
        measured = folder / "measures.json"
        if not measured.is_file():
            for name in STAGES:
                run_stage(name, folder / name, student_places(name, start, arm, seed, quickstart, base), settings)
                start = folder / name
            write_json(measured, measure(folder / STAGES[-1], base, quickstart, options.split))
        found[arm][seed] = json.loads(measured.read_text(encoding="utf-8"))
        print(seed, arm, found[arm][seed], flush=True)
    print(table(found))
    if options.write:
        pages.put(pages.DOCS / "distillation.md", "distillation.py", table(found))


if __name__ == "__main__":
    sys.exit(main())
