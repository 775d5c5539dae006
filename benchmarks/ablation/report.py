"""From the outcomes of the runs to a table, a picture, and what disagrees with the papers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ablation.planning import DEFAULT, Plan
from ablation.running import DONE, Outcome
from ablation.studies import Claim, Study

METRICS = {"vqa": "pictures", "text": "text", "text_open": "text, open routing"}
Rows = dict[tuple[str, str], "Row"]


@dataclass(frozen=True)
class Row:
    """All seeds of one level of one factor.

    Attributes:
        values: Metric -> value by seed, of the seeds that came to an end with finite weights.
        seconds: Mean training seconds.
        facts: Facts that are the same kind of thing for all seeds: `new_parameters`, `layers`, by seed.
        troubles: What went wrong, by seed.
    """

    values: Mapping[str, Mapping[int, float]]
    seconds: float | None
    facts: Mapping[str, Mapping[int, Any]]
    troubles: Mapping[int, str]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns mean and standard deviation (ddof 1); one value alone has no spread.

    Example:
        >>> mean_and_spread([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def collect(plan: Plan, outcomes: Mapping[str, Outcome]) -> Rows:
    """Gathers the outcomes of each level."""
    return {
        level: _row({seed: outcomes.get(name, {"status": "missing"}) for seed, name in names.items()})
        for level, names in plan.results.items()
    }


def _row(by_seed: Mapping[int, Outcome]) -> Row:
    troubles = {s: o.get("error", o["status"]) for s, o in by_seed.items() if o["status"] != DONE}
    ended = {s: o for s, o in by_seed.items() if o["status"] == DONE}
    troubles |= {s: "diverged: a weight is infinite or no number" for s, o in ended.items() if not _finite(o)}
    good = {s: o for s, o in ended.items() if _finite(o)}
    values = {m: {s: o["measures"][m] for s, o in good.items() if m in o["measures"]} for m in METRICS}
    names = ("new_parameters", "trained_parameters", "layers", "sources")
    facts = {n: {s: o["measures"][n] for s, o in good.items() if n in o["measures"]} for n in names}
    seconds = statistics.fmean(o["training_seconds"] for o in good.values()) if good else None
    return Row(values, seconds, facts, troubles)


def _finite(outcome: Outcome) -> bool:
    return bool(outcome["measures"]["finite"])


def levels(study: Study, rows: Rows) -> list[tuple[str, str, Row]]:
    """Returns (factor, level, row), the default in its place in every factor that was varied."""
    found = []
    for factor, default in study.defaults.items():
        others = [(level, row) for (name, level), row in rows.items() if name == factor]
        if others:
            found.append((factor, default, rows[DEFAULT.factor, DEFAULT.level]))
            found += [(factor, level, row) for level, row in others]
    return found or [(DEFAULT.factor, DEFAULT.level, rows[DEFAULT.factor, DEFAULT.level])]


def findings(study: Study, rows: Rows) -> list[str]:
    """Compares what came out with what the papers say, seed by seed.

    Two levels share their seeds and all earlier stages, so the difference is taken within each seed; it counts
    if its mean is larger than its standard deviation over the seeds.
    """
    by_level = {(factor, level): row for factor, level, row in levels(study, rows)}
    return [_finding(claim, by_level) for claim in study.claims if _is_there(claim, by_level)]


def _is_there(claim: Claim, rows: Mapping[tuple[str, str], Row]) -> bool:
    return all((claim.factor, level) in rows for level in (claim.better, claim.worse))


def _finding(claim: Claim, rows: Mapping[tuple[str, str], Row]) -> str:
    better, worse = (rows[claim.factor, level] for level in (claim.better, claim.worse))
    what = f"{claim.factor}: {claim.better} over {claim.worse} ({claim.source})"
    pairs = [
        (value, worse.values[claim.metric][seed])
        for seed, value in better.values[claim.metric].items()
        if seed in worse.values[claim.metric]
    ]
    if not pairs:
        trouble = next(iter((worse.troubles | better.troubles).values()), "no result")
        return f"not compared - {what}: {trouble}"
    mean, spread = mean_and_spread([first - second for first, second in pairs])
    numbers = f"{100 * mean:+.1f} points" + (f" ± {100 * spread:.1f}" if spread is not None else "")
    return f"{verdict(mean, spread)} - {what}: here {numbers} on {METRICS[claim.metric]}, {len(pairs)} seed(s)"


def verdict(difference: float, spread: float | None) -> str:
    """Judges a difference that a paper says is positive.

    Args:
        difference: Mean over seeds.
        spread: Standard deviation over seeds, None for one seed.
    """
    if spread is None:
        return "one seed, no verdict"
    if abs(difference) <= spread:
        return "within noise"
    return "agrees" if difference > 0 else "DISAGREES"


def summary(study: Study, rows: Rows) -> list[dict[str, Any]]:
    """Returns the table as plain data, one item a level."""
    items = []
    for factor, level, row in levels(study, rows):
        item: dict[str, Any] = {"factor": factor, "level": level, "default": study.defaults.get(factor) == level}
        for metric in METRICS:
            values = list(row.values[metric].values())
            mean, spread = mean_and_spread(values) if values else (None, None)
            item[metric] = {"mean": mean, "std": spread, "seeds": dict(row.values[metric])}
        items.append({**item, "seconds": row.seconds, "facts": row.facts, "troubles": dict(row.troubles)})
    return items


def markdown(study: Study, rows: Rows) -> str:
    """Writes table and findings."""
    lines = [
        f"| factor | level | {' | '.join(METRICS.values())} | s | new parameters | layers by seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in summary(study, rows):
        mark = " (default)" if item["default"] else ""
        cells = [item["factor"], f"{item['level']}{mark}", *(_number(item[metric]) for metric in METRICS)]
        facts = item["facts"]
        cells.append("-" if item["seconds"] is None else f"{item['seconds']:.0f}")
        cells.append(", ".join(sorted({f"{n:,}" for n in facts["new_parameters"].values()})) or "-")
        cells.append("; ".join(",".join(map(str, chosen)) for chosen in facts["layers"].values()) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    troubles = [
        f"- {item['factor']}, {item['level']}, seed {seed}: {trouble}"
        for item in summary(study, rows)
        for seed, trouble in item["troubles"].items()
    ]
    parts = ["# Ablation", "Mean ± standard deviation over seeds of exact-match accuracy.", "\n".join(lines)]
    parts += ["## Without a result", "\n".join(troubles)] if troubles else []
    parts += ["## Against the papers", "\n".join(f"- {line}" for line in findings(study, rows)), "![](ablation.png)"]
    return "\n\n".join(parts) + "\n"


def _number(metric: Mapping[str, Any]) -> str:
    if metric["mean"] is None:
        return "-"
    return f"{metric['mean']:.4f}" + ("" if metric["std"] is None else f" ± {metric['std']:.4f}")


def plot(study: Study, rows: Rows, path: Path) -> None:
    """Draws mean and standard deviation of every level, and each seed as a small dot."""
    items = summary(study, rows)
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(items)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric in zip(axes, ("vqa", "text"), strict=True):
        for place, item in enumerate(items):
            values, colour = item[metric], "tab:orange" if item["default"] else "tab:blue"
            if values["mean"] is None:
                continue
            axis.errorbar(values["mean"], place, xerr=values["std"] or 0.0, fmt="o", color=colour, capsize=3)
            axis.plot(list(values["seeds"].values()), [place] * len(values["seeds"]), ".", color="gray", markersize=3)
        axis.set(xlabel=f"accuracy, {METRICS[metric]}")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(items)), [f"{item['factor']}: {item['level']}" for item in items])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
