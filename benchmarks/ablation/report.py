"""From the outcomes of the runs to a table, a picture, and what becomes of each claim."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pages import grid

from ablation.planning import DEFAULT, Plan
from ablation.running import DONE, Outcome
from ablation.studies import Claim, Level, Study
from ablation.verdicts import Effect, corrected, paired_effect, smallest_effect, verdict

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


@dataclass(frozen=True)
class Finding:
    """What the runs say of a claim.

    Attributes:
        claim: The claim.
        effect: Of the differences within each seed; None if fewer than two seeds have both levels.
        p: Corrected for the number of claims with an effect.
        smallest: The effect that these seeds would have shown with probability 0.8, corrected likewise.
        verdict: In a word, or why there is none.
    """

    claim: Claim
    effect: Effect | None
    p: float | None
    smallest: float | None
    verdict: str


def findings(study: Study, rows: Rows) -> list[Finding]:
    """Compares what came out with what is said, seed by seed.

    Two levels share their seeds and all earlier stages, so the difference is taken within each seed.
    """
    by_level = {(factor, level): row for factor, level, row in levels(study, rows)}
    claims = [claim for claim in study.claims if {claim.better, claim.worse} <= by_level.keys()]
    differences = [_differences(claim, by_level) for claim in claims]
    effects = [paired_effect(found) if len(found) > 1 else None for found in differences]
    tried = [effect.p for effect in effects if effect is not None]
    left = iter(corrected(tried))
    found = []
    for claim, effect, values in zip(claims, effects, differences, strict=True):
        if effect is None:
            trouble = next(iter((by_level[claim.worse].troubles | by_level[claim.better].troubles).values()), "")
            word = trouble or ("one seed, no verdict" if values else "no result")
            found.append(Finding(claim, None, None, None, word))
            continue
        p, smallest = next(left), smallest_effect(effect.spread, effect.seeds, len(tried))
        found.append(Finding(claim, effect, p, smallest, verdict(effect, p)))
    return found


def _differences(claim: Claim, rows: Mapping[Level, Row]) -> list[float]:
    better, worse = (rows[level].values[claim.metric] for level in (claim.better, claim.worse))
    return [value - worse[seed] for seed, value in better.items() if seed in worse]


def claims_table(found: Sequence[Finding]) -> str:
    """Returns the verdicts as a table; differences in points."""
    rows = []
    for one in found:
        (factor, better), (other, worse) = one.claim.better, one.claim.worse
        what = f"{factor}: {better} over {'' if other == factor else f'{other} '}{worse}"
        cells = ["-"] * 4
        if (effect := one.effect) is not None and one.p is not None and one.smallest is not None:
            low, mean, high, least = (100 * n for n in (effect.low, effect.mean, effect.high, one.smallest))
            cells = [f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", f"{one.p:.2g}", f"{least:.2f}", str(effect.seeds)]
        rows.append([what, one.claim.source, METRICS[one.claim.metric], *cells, one.verdict])
    columns = ["claim", "who says so", "on", "points, 95 %", "p", "would be seen", "seeds", "verdict"]
    return grid(columns, rows)


def promise(study: Study, seeds: int) -> str:
    """Returns what so many seeds can find, as it is known before they are run."""
    if not study.pilot or seeds < 2:
        return ""
    alone, among_all = (100 * smallest_effect(study.pilot, seeds, n) for n in (1, len(study.claims)))
    return (
        f"Known before the runs: if differences spread by {100 * study.pilot:.1f} points over seeds, {seeds} seeds "
        f"find one of {alone:.1f} points with probability 0.8 where it is the only claim, and one of {among_all:.1f} "
        f"points among {len(study.claims)} claims."
    )


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


def levels_table(study: Study, rows: Rows) -> str:
    """Returns mean and standard deviation of every level as a table."""
    lines = []
    for item in summary(study, rows):
        facts = item["facts"]
        lines.append(
            [
                item["factor"],
                f"{item['level']}{' (default)' if item['default'] else ''}",
                *(_number(item[metric]) for metric in METRICS),
                "-" if item["seconds"] is None else f"{item['seconds']:.0f}",
                ", ".join(sorted({f"{n:,}" for n in facts["trained_parameters"].values()})) or "-",
                "; ".join(",".join(map(str, chosen)) for chosen in facts["layers"].values()) or "-",
            ]
        )
    return grid(["factor", "level", *METRICS.values(), "s", "parameters learned", "layers by seed"], lines)


def markdown(study: Study, rows: Rows) -> str:
    """Writes tables of levels and claims."""
    troubles = [
        f"- {item['factor']}, {item['level']}, seed {seed}: {trouble}"
        for item in summary(study, rows)
        for seed, trouble in item["troubles"].items()
    ]
    parts = ["# Ablation", "Mean ± standard deviation over seeds of exact-match accuracy.", levels_table(study, rows)]
    parts += ["## Without a result", "\n".join(troubles)] if troubles else []
    parts += ["## Claims", claims_table(findings(study, rows)), "![](ablation.png)"]
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
