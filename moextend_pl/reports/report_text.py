"""The report of the quickstart as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def accuracy_rows(data: Mapping[str, Any]) -> list[tuple[str, float | None, float | None, int]]:
    """Returns model, picture accuracy, text accuracy and learned parameters, one row a model."""
    rows: list[tuple[str, float | None, float | None, int]] = [
        ("base language model", None, data["text_accuracy_base"], 0),
        (
            "aligned (projector only)",
            data["vqa_accuracy_aligned"],
            data["text_accuracy_base"],
            data.get("trainable_parameters_aligned", 0),  # a report measured by an earlier version has none
        ),
        (
            "extended, masked routing",
            data["vqa_accuracy"],
            data["text_accuracy_extended"],
            data["trainable_parameters"],
        ),
        ("extended, open routing", data["vqa_accuracy"], data["text_accuracy_open"], data["trainable_parameters"]),
    ]
    if "full_finetune" in data:
        full = data["full_finetune"]
        rows.append(("full fine-tuning", full["vqa_accuracy"], full["text_accuracy"], full["trainable_parameters"]))
    return rows


def _table(data: Mapping[str, Any]) -> str:
    lines = ["| model | pictures | text | parameters learned |", "|---|---|---|---|"]
    for name, pictures, text, learned in accuracy_rows(data):
        first = "-" if pictures is None else f"{pictures:.4f}"
        second = "-" if text is None else f"{text:.4f}"
        lines.append(f"| {name} | {first} | {second} | {f'{learned:,}' if learned else '-'} |")
    return "\n".join(lines)


def _baseline(data: Mapping[str, Any]) -> str:
    if "full_finetune" not in data:
        return ""
    return (
        "The baseline trains projector and language model on the same data for the same steps "
        f"(AdamW, learning rate {data['full_finetune']['learning_rate']:g}).\n\n"
    )


def _growth(data: Mapping[str, Any]) -> str:
    pairs = zip(data["layers"], data["source_experts"], strict=True)
    return ", ".join(f"layer {layer} from expert {', '.join(map(str, sources))}" for layer, sources in pairs)


TEMPLATE = """# A text model that learned to see

A mixture-of-experts language model was trained on text alone, then extended. Tower, projector and language model have
{total_parameters:,} parameters, of which {trainable_parameters:,} learned in the extension: new experts, their router
rows and calibration, and the projector. Accuracy is exact match of the greedily generated answer: pictures are the
9,673 questions of the official easy-VQA test split, text the same questions about described scenes of that split.

{table}

{baseline}![accuracy](plots/accuracy.png)

## Nothing was forgotten

- Logits of every held-out text are bit-identical to the base's: **{identical}**
- Every frozen tensor is bit-identical to the base's files: **{unchanged}**
- What was learned is a delta of {delta_megabytes:.2f} MB: `3_extend/delta.safetensors`

## Questions and answers

![answers](plots/answers.png)

## Which layers were extended, and why

New experts: {growth}.

![shift](plots/shift.png)

![usage before and after the probe](plots/usage.png)

Usage after the extension, the new expert in the last column of an extended layer:

![usage after the extension](plots/usage_extended.png)

## Training

![losses](plots/losses.png)

| step | seconds |
|---|---|
{seconds}

Peak memory: {peak_memory_gb:.2f} GB.
"""


def markdown(data: Mapping[str, Any]) -> str:
    """Returns what `report.json` holds as Markdown that shows the plots beside it."""
    return TEMPLATE.format(
        total_parameters=data["total_parameters"],
        trainable_parameters=data["trainable_parameters"],
        table=_table(data),
        baseline=_baseline(data),
        identical=_yes(data["text_logits_identical"]),
        unchanged=_yes(data["frozen_unchanged"]),
        delta_megabytes=data["delta_bytes"] / 1e6,
        growth=_growth(data),
        seconds="\n".join(f"| {name} | {value:.0f} |" for name, value in data["seconds"].items()),
        peak_memory_gb=data["peak_memory_gb"],
    )
