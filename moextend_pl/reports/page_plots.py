"""Figures of the page as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moextend_pl.moe.usage import TOKEN_KINDS
from moextend_pl.reports.run_facts import Curve

OLD, NEW = "#4a6fa5", "#e8710a"
THROUGHPUT = {
    "tokens a second": ("items_per_sec", "tokens_per_sec"),
    "samples a second": ("samples_per_sec",),
}
LOSSES = ("train/loss", "val/loss")
ROUTING = {
    "entropy": "entropy (1: all experts alike)",
    "dead": "experts hardly chosen",
    "overloaded": "experts chosen twice too often",
    "new_image": "image tokens on new experts",
    "new_text": "text tokens on new experts",
}
MOST_LAYERS = 12


def svg(figure: Figure) -> str:
    """Returns a figure as SVG that stands inside of HTML, the same for the same figure."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "moextend_pl", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _axes(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=8)
        axis.set_xlabel("step", fontsize=8)
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes


def curves_svg(curves: Mapping[str, Curve]) -> str:
    """Draws loss, other scores of validation, and throughput; '' where nothing was logged."""
    groups: dict[str, dict[str, Curve]] = {"loss": {name: curves[name] for name in LOSSES if name in curves}}
    for name, curve in curves.items():
        if name.startswith("val/") and name not in LOSSES:
            groups[name.removeprefix("val/").replace("_", " ")] = {name: curve}
    for label, endings in THROUGHPUT.items():
        found = {name: curve for name, curve in curves.items() if name.endswith(endings) and "device" not in name}
        groups[label] = dict(list(found.items())[:1])
    groups = {label: found for label, found in groups.items() if found}
    if not groups:
        return ""
    figure, axes = _axes(len(groups))
    for axis, (label, found) in zip(axes, groups.items(), strict=False):
        for (name, (steps, values)), colour in zip(found.items(), (OLD, NEW), strict=False):
            mark = "o" if len(steps) < 30 else None
            axis.plot(steps, values, color=colour, linewidth=1, marker=mark, markersize=3, label=name)
        axis.set_title(label, fontsize=9)
        if len(found) > 1:
            axis.legend(fontsize=7, frameon=False)
        if label == "loss" and all(value > 0 for _, values in found.values() for value in values):
            axis.set_yscale("log")
    return svg(figure)


def scores_svg(plan: Mapping[str, Any]) -> str:
    """Draws the score of every layer of a plan, the extended ones in colour; '' where the plan tells none."""
    report = plan.get("report")
    scores = report.get("scores") if isinstance(report, dict) else None
    if not isinstance(scores, dict) or not scores:
        return ""
    chosen = {int(layer["layer"]) for layer in plan.get("layers", ())}
    figure = Figure(figsize=(max(4.0, 0.28 * len(scores)), 2.4), layout="constrained")
    axis = figure.subplots()
    names = [str(layer) for layer in scores]
    axis.bar(names, list(scores.values()), color=[NEW if int(name) in chosen else "#d0d5dc" for name in names])
    axis.set_title("extended layers in orange", fontsize=9)
    axis.set_xlabel("layer", fontsize=8)
    axis.set_ylabel("shift of usage", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def routing_svg(curves: Mapping[str, Curve]) -> str:
    """Draws what `UsageLog` logged of the language model, over the steps; '' where it logged nothing."""
    found = {label: curves[f"language/{name}"] for name, label in ROUTING.items() if f"language/{name}" in curves}
    if not found:
        return ""
    figure, axes = _axes(len(found))
    for axis, (label, (steps, values)) in zip(axes, found.items(), strict=False):
        axis.plot(steps, values, color=NEW if "new" in label else OLD, linewidth=1.2)
        axis.set_title(label, fontsize=9)
        axis.set_ylim(-0.02, 1.02)
    return svg(figure)


def retention_svg(curves: Mapping[str, Curve]) -> str:
    """Draws what `RetentionGate` logged, over the steps; '' where it logged nothing."""
    found = {name: curve for name, curve in curves.items() if name.startswith("retention/")}
    if not found:
        return ""
    figure, axes = _axes(len(found))
    for axis, (name, (steps, values)) in zip(axes, found.items(), strict=False):
        axis.plot(steps, values, color=OLD, linewidth=1.2, marker="o", markersize=3)
        axis.set_title(name.removeprefix("retention/").replace("_", " "), fontsize=9)
    return svg(figure)


def usage_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draws the share of every expert over the steps, a map a layer and kind of token; extended layers come first.

    Args:
        rows: Lines of `expert_usage.jsonl`.
    """
    rows = [row for row in rows if isinstance(row.get("language"), dict)]
    if len(rows) < 2:
        return ""
    grown = rows[-1].get("new", {})
    layers = sorted(rows[-1]["language"]["all"], key=lambda layer: (layer not in grown, int(layer)))[:MOST_LAYERS]
    layers.sort(key=int)
    figure = Figure(figsize=(10.8, 0.4 + 1.5 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), len(TOKEN_KINDS), squeeze=False)
    for row, layer in zip(axes, layers, strict=True):
        for axis, kind in zip(row, TOKEN_KINDS, strict=True):
            counts = np.array([one["language"][kind][layer] for one in rows], dtype=float).T
            shares = counts / np.maximum(counts.sum(axis=0, keepdims=True), 1)
            steps = [rows[0]["step"], rows[-1]["step"]]
            extent = (steps[0], steps[1], len(shares) - 0.5, -0.5)
            drawn = axis.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="viridis", extent=extent)
            axis.set_title(f"layer {layer}, {kind} tokens", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.set_yticks(range(len(shares)) if len(shares) <= 9 else [0, len(shares) - 1])
            for tick in axis.get_yticklabels()[max(len(shares) - grown.get(layer, 0), 0) :]:
                tick.set_color(NEW)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("expert (new ones in orange)", fontsize=8)
    figure.colorbar(drawn, ax=axes.ravel().tolist(), label="share of selections", shrink=0.6)
    return svg(figure)
