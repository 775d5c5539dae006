"""Pictures of a run: expert usage, shift of the layers, loss curves."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from moextend_pl.moe.usage import TOKEN_KINDS, usage_shares
from moextend_pl.reports.report_text import accuracy_rows

Counts = Mapping[str, Mapping[int, Tensor]]


def save(figure: Figure, path: Path | IO[bytes]) -> None:
    """Writes a figure as PNG, to a place or into what is open."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _shares(counts: Mapping[int, Tensor]) -> Tensor:
    widest = max(len(c) for c in counts.values())
    rows = torch.full((len(counts), widest), float("nan"), dtype=torch.float64)
    for row, (_, count) in zip(rows, sorted(counts.items()), strict=True):
        row[: len(count)] = usage_shares(count)
    return rows


def plot_usage(moments: Mapping[str, Counts], path: Path | IO[bytes]) -> None:
    """Draws heat maps of expert usage, image tokens and text tokens apart where there are both.

    Args:
        moments: Counts by token kind and layer, for each moment shown (one row of maps each).
        path: Where the PNG goes; a place, or what is open.
    """
    kinds = [kind for kind in TOKEN_KINDS if any(c.any() for m in moments.values() for c in m[kind].values())]
    kinds = kinds or list(TOKEN_KINDS)
    figure = Figure(figsize=(4.2 * len(kinds), 0.9 + 2.4 * len(moments)), layout="constrained")
    axes = figure.subplots(len(moments), len(kinds), squeeze=False)
    for row, (moment, counts) in zip(axes, moments.items(), strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            shares = _shares(counts[kind])
            layers = sorted(counts[kind])
            image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, values in enumerate(shares.tolist()):
                for x, value in enumerate(values):
                    if value == value:
                        axis.text(
                            x,
                            y,
                            f"{value:.2f}",
                            ha="center",
                            va="center",
                            color="w" if value < 0.6 else "k",
                            fontsize=7,
                        )
            axis.set(title=f"{kind} tokens, {moment}", xlabel="expert", ylabel="layer")
            axis.set_xticks(range(shares.shape[1]))
            axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    figure.colorbar(image, ax=axes.ravel().tolist(), label="share of top-k selections")
    save(figure, path)


def plot_scores(scores: Mapping[int, float], chosen: Iterable[int], rule: str, path: Path) -> None:
    """Draws the score of every layer, the chosen ones marked."""
    chosen = set(chosen)
    figure = Figure(figsize=(5, 2.8))
    axis = figure.subplots()
    colours = ["tab:orange" if layer in chosen else "lightgray" for layer in scores]
    bars = axis.bar([str(layer) for layer in scores], list(scores.values()), color=colours)
    axis.bar_label(bars, [f"{score:.3f}" for score in scores.values()], fontsize=7)
    axis.set(xlabel="layer", ylabel="shift of usage", title=f"{rule}: extended layers in orange")
    save(figure, path)


def read_metrics(path: Path, name: str) -> tuple[list[int], list[float]]:
    """Reads one column of Lightning's `metrics.csv`: steps and values, where it has one."""
    with path.open(newline="") as file:
        # A continued run took some steps twice; the last row of a step counts.
        rows = {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}
    return sorted(rows), [rows[step] for step in sorted(rows)]


def plot_losses(runs: Mapping[str, Path], path: Path) -> None:
    """Draws the training loss of several runs, each by its `metrics.csv`, side by side."""
    figure = Figure(figsize=(3.1 * len(runs), 2.6))
    axes = figure.subplots(1, len(runs), squeeze=False)[0]
    for axis, (name, metrics) in zip(axes, runs.items(), strict=True):
        axis.plot(*read_metrics(metrics, "train/loss"), linewidth=0.8, label="train")
        steps, values = read_metrics(metrics, "val/loss")
        if steps:
            axis.plot(steps, values, "o-", markersize=3, label="val")
        axis.set(title=name, xlabel="step", yscale="log")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("loss")
    figure.tight_layout()
    save(figure, path)


def plot_accuracies(data: Mapping[str, Any], path: Path) -> None:
    """Draws picture and text accuracy of every model of the quickstart, out of its `report.json`."""
    rows = accuracy_rows(data)
    figure = Figure(figsize=(7, 0.8 + 0.5 * len(rows)))
    axis = figure.subplots()
    bars_of_accuracy(axis, rows)
    axis.set(xlabel="exact-match accuracy on the test split")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    save(figure, path)


def bars_of_accuracy(axis: Axes, rows: Sequence[tuple[Any, ...]]) -> None:
    """Draws two bars a row: its second entry is the accuracy on pictures, its third that on text, None for none."""
    for shift, colour, label, column in ((-0.18, "tab:orange", "pictures", 1), (0.18, "tab:blue", "text", 2)):
        values = [row[column] for row in rows]
        bars = axis.barh(
            [y + shift for y in range(len(rows))], [value or 0.0 for value in values], 0.34, color=colour, label=label
        )
        texts = ["-" if value is None else f"{value:.3f}" for value in values]
        axis.bar_label(bars, texts, fontsize=8, padding=2)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.12))


def shown_pixels(batch: Mapping[str, Any], place: int, spec: Any) -> Tensor:
    """Returns a picture of a batch as a person sees it, (H, W, 3) in 0 to 1."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (spec.image_mean, spec.image_std))
    return (batch["pixel_values"][place] * std + mean).clamp(0, 1).permute(1, 2, 0)


def save_example(datamodule: Any, path: Path) -> None:
    """Writes the first picture of the first test set as PNG, to ask about."""
    batch = next(iter(datamodule.test_dataloader()[0]))
    pixels = (shown_pixels(batch, 0, datamodule.sample_spec()) * 255).round().to(torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


def plot_answers(datamodule: Any, predictions: Path, path: Path, count: int = 8) -> None:
    """Shows pictures with question, answer and truth.

    Args:
        datamodule: Its first test loader holds the pictures.
        predictions: Answers to that loader's questions, as `WritePredictions` wrote them.
        path: Where the PNG goes.
        count: Number of pictures.
    """
    with predictions.open() as file:
        answers = {row["key"]: row for row in map(json.loads, file)}
    batch = next(iter(datamodule.test_dataloader()[0]))
    spec = datamodule.sample_spec()
    # The first question of a picture says much the same of every picture; later ones differ more.
    chosen = list(range(0, len(batch["keys"]), max(len(batch["keys"]) // count, 1)))[:count]
    figure = Figure(figsize=(2.2 * 4, 2.7 * (count // 4)))
    for axis, place in zip(figure.subplots(count // 4, 4).flat, chosen, strict=True):
        row = answers[batch["keys"][place]]
        axis.imshow(shown_pixels(batch, place, spec))
        mark = "right" if row["correct"] else f"wrong, truth: {row['answer']}"
        axis.set_title(f"{row['prompt']}\n{row['prediction']} ({mark})", fontsize=7)
        axis.axis("off")
    figure.tight_layout()
    save(figure, path)
