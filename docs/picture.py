"""Draws the picture of the README from a finished quickstart: `make picture`.

A held-out picture with a question, where new experts grew, and what it did to pictures and to text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from datamodules.show import find_sample  # noqa: E402
from moextend_pl.contracts import PLAN_FILE, ExtensionPlan  # noqa: E402
from moextend_pl.reports.plots import bars_of_accuracy, save  # noqa: E402
from moextend_pl.samples.pixels import open_image  # noqa: E402

NEW, FROZEN, INK = "tab:orange", "#d9dde3", "#333333"
MODELS = {"1_align": "base + projector", "3_extend": "with new experts"}


def answers(run: Path) -> dict[str, dict[str, Any]]:
    """Returns what a run answered to the questions about test pictures, by key."""
    lines = (run / "predictions_vqa.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["key"]: row for row in map(json.loads, lines)}


def draw_question(axis: Axes, run: Path) -> None:
    """Shows the first open question that the new experts brought to a right answer."""
    given = {name: answers(run / name) for name in MODELS}
    before, after = given.values()
    key = next(
        key
        for key, row in after.items()
        if row["correct"] and not before[key]["correct"] and row["prompt"].startswith("what")
    )
    raw = find_sample(run / "data" / "vqa" / "test", key.split("#")[0])
    shown = axis.inset_axes((0, 0.4, 1, 0.6))
    shown.imshow(open_image(raw.images[0], raw.origin), interpolation="nearest")
    shown.set(xticks=[], yticks=[])
    axis.set(xlim=(0, 1), ylim=(0, 1), title="A held-out picture, a question")
    axis.axis("off")
    axis.text(0.5, 0.28, f"“{after[key]['prompt']}”", ha="center", fontsize=11, style="italic", color=INK)
    for y, (name, words) in zip((0.14, 0.02), MODELS.items(), strict=True):
        row = given[name][key]
        mark, colour = ("✓", "tab:green") if row["correct"] else ("✗", "tab:red")
        axis.text(0.62, y, words, ha="right", fontsize=10, color=INK)
        axis.text(0.66, y, f"{row['prediction']} {mark}", fontsize=11, color=colour, weight="bold")


def draw_experts(axis: Axes, run: Path) -> None:
    """Draws every layer of the language model as a row of experts, the new ones in colour."""
    plan = ExtensionPlan.load(run / "2_probe" / PLAN_FILE)
    usage = json.loads((run / "3_extend" / "usage.json").read_text(encoding="utf-8"))
    new = {growth.layer: len(growth.sources) for growth in plan.layers}
    counts = {int(layer): len(values) for layer, values in usage["end"]["all"].items()}
    for layer, count in counts.items():
        for expert in range(count):
            grown = expert >= count - new.get(layer, 0)
            axis.add_patch(
                FancyBboxPatch(
                    (expert + 0.1, layer + 0.14), 0.8, 0.72, boxstyle="round,pad=0,rounding_size=0.12",
                    facecolor=NEW if grown else FROZEN, edgecolor="none",
                )
            )  # fmt: skip
            if grown:
                axis.text(expert + 0.5, layer + 0.5, "new", ha="center", va="center", color="white", weight="bold")
    axis.set(
        xlim=(0, max(counts.values())),
        ylim=(0, len(counts)),
        title=f"New experts in {len(new)} of {len(counts)} layers",
    )
    axis.set_yticks([layer + 0.5 for layer in counts], [f"layer {layer}" for layer in counts])
    axis.set_xticks([])
    axis.set_xlabel("grey: experts of the text model, frozen")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def draw_accuracy(axis: Axes, run: Path) -> None:
    """Draws accuracies of the text model, the extended one, and full fine-tuning."""
    data = json.loads((run / "report.json").read_text(encoding="utf-8"))
    full = data["full_finetune"]
    rows = [
        ("text model", None, data["text_accuracy_base"]),
        ("extended", data["vqa_accuracy"], data["text_accuracy_extended"]),
        ("full fine-\ntuning", full["vqa_accuracy"], full["text_accuracy"]),
    ]
    bars_of_accuracy(axis, rows)
    lost = 100 * (data["text_accuracy_base"] - full["text_accuracy"])
    kept = ": every logit as before" if data["text_logits_identical"] else ""
    inside = [("", "text questions"), ("pictures", f"text{kept}"), ("pictures", f"text: {lost:.0f} points forgotten")]
    for y, words in enumerate(inside):
        for shift, text in zip((-0.18, 0.18), words, strict=True):
            axis.text(0.02, y + shift, text, va="center", color="white", weight="bold", fontsize=9)
    axis.text(0.02, -0.18, "cannot see pictures", va="center", color=INK, fontsize=9)
    axis.texts[0].set_visible(False)  # the mark for no accuracy
    axis.set(title="Right answers, test questions", xticks=[])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def main(run: Path, target: Path) -> None:
    """Draws the picture of a quickstart."""
    figure = Figure(figsize=(11.5, 3.6), layout="constrained")
    parts = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.25))
    for axis, draw in zip(parts, (draw_question, draw_experts, draw_accuracy), strict=True):
        draw(axis, run)
    save(figure, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "picture.png")
