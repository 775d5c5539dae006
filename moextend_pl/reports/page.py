"""A run, or several, as one HTML page: nothing is loaded from elsewhere, and it can be sent as it is."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from moextend_pl.reports.page_plots import curves_svg, retention_svg, routing_svg, scores_svg, usage_svg
from moextend_pl.reports.page_style import STYLE
from moextend_pl.reports.run_facts import RunFacts

DRAWN_HERE = ("losses", "shift")
"""Pictures of a run that the page draws itself."""

PAGE = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head>
<body><header><h1>$title</h1><nav>$links</nav></header><main>
$sections
</main></body></html>
"""
)


def page(title: str, runs: Sequence[RunFacts]) -> str:
    """Returns the page.

    Args:
        title: What stands on top.
        runs: What each run left behind.
    """
    links = " ".join(f'<a href="#{escape(run.name)}">{escape(run.name)}</a>' for run in runs) if len(runs) > 1 else ""
    sections = "\n".join(map(_section, runs))
    return PAGE.substitute(title=escape(title), style=STYLE, links=links, sections=sections)


def _section(run: RunFacts) -> str:
    blocks = [
        _tiles(run),
        _figures("How it learned", curves_svg(run.curves)),
        _figures("Which layers shift, and which were extended", scores_svg(run.plan)),
        _figures("Which experts its tokens choose", routing_svg(run.curves), usage_svg(run.usage)),
        *(_answers(name, *found) for name, found in run.answers.items()),
        _scores(run.scores),
        _figures("What it still knows, while it learned", retention_svg(run.curves)),
        _retention(run.retention),
        _pictures(run.pictures),
        _settings(run),
    ]
    return f'<section id="{escape(run.name)}"><h2>{escape(run.name)}</h2>{"".join(blocks)}</section>'


def tiles(run: RunFacts) -> dict[str, str]:
    """Returns the few facts that stand first, by what they are called."""
    receipt, found = run.receipt, {}
    if not receipt:
        last = max((steps[-1] for steps, _ in run.curves.values()), default=0)
        found["state"] = f"not ended; last logged step {last + 1:,}"
    else:
        found["steps"] = f"{receipt.get('steps') or 0:,}"
        found["trained for"] = _duration(float(receipt.get("seconds") or 0))
    for name, label in (("val/loss", "validation loss"), ("val/token_accuracy", "validation accuracy of tokens")):
        if name in run.curves:
            found[label] = f"{run.curves[name][1][-1]:.4g}"
    if "unchanged" in run.frozen:
        word = "unchanged, bit for bit" if run.frozen["unchanged"] else "CHANGED"
        found[f"{run.frozen.get('tensors', 0):,} frozen tensors"] = word
    if run.plan.get("layers"):
        found["new experts"] = f"{sum(len(layer.get('sources', ())) for layer in run.plan['layers'])}"
    for name, (_, right, count) in run.answers.items():
        if count:
            found[f"right on {name}"] = f"{right / count:.1%} of {count:,}"
    return found


def _tiles(run: RunFacts) -> str:
    each = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in tiles(run).items()
    )
    return f'<div class="tiles">{each}</div>'


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 2 else f"{seconds:.0f} s"


def _figures(heading: str, *figures: str) -> str:
    drawn = "".join(f"<figure>{figure}</figure>" for figure in figures if figure)
    return f"<h3>{escape(heading)}</h3>{drawn}" if drawn else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _answers(name: str, rows: Sequence[Mapping[str, Any]], right: int, count: int) -> str:
    if not rows:
        return ""
    cells = [
        [
            str(row.get("prompt", "")),
            str(row.get("prediction", "")),
            str(row.get("answer", "")),
            "right" if row.get("correct") else "wrong",
        ]
        for row in rows
    ]
    heading = f"<h3>Answers to {escape(name)}: {right:,} of {count:,} right</h3>"
    return heading + _table(("question", "answer", "expected", ""), cells)


def _scores(scores: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [task, name, f"{each['value']:.4f}", f"{each['low']:.4f} to {each['high']:.4f}"]
        for task, found in scores.items()
        for name, each in found.get("scores", {}).items()
    ]
    return "<h3>Published test sets</h3>" + _table(("task", "score", "value", "95 % interval"), rows) if rows else ""


def _retention(found: Mapping[str, Any]) -> str:
    rows = []
    for name, each in found.items():
        for number, before in each["base"].items():
            if before is not None:
                rows.append([name, number.replace("_", " "), f"{before:.4f}", f"{each['extended'][number]:.4f}"])
        drift = each["drift"]
        apart = "identical, bit for bit" if drift["identical"] else f"up to {drift['largest']:.3g} apart"
        rows.append([name, "logits", "", apart])
        rows.append([name, "tokens that chose a new expert", "", f"{each['chose_new']:.2%}"])
    head = ("texts", "", "base", "extended")
    return "<h3>What it still knows</h3>" + _table(head, rows) if rows else ""


def _pictures(pictures: Mapping[str, bytes]) -> str:
    shown = "".join(
        f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{escape(name.replace('_', ' '))}</figcaption></figure>"
        for name, data in pictures.items()
        if name not in DRAWN_HERE
    )
    return f"<h3>Drawn by the run</h3>{shown}" if shown else ""


def _settings(run: RunFacts) -> str:
    rows = [[name, value] for name, value in flat({"": run.config}) if value not in ("", "None")]
    versions = run.manifest.get("versions", {})
    rows += (
        [[f"version of {name}", str(value)] for name, value in versions.items()] if isinstance(versions, dict) else []
    )
    table = _table(("setting", "value"), rows)
    return f"<details><summary>All {len(rows)} settings</summary>{table}</details>" if rows else ""


def flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Returns nested settings as rows of dotted names and texts."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{above}.{key}".strip(".")
        rows += flat(value, name) if isinstance(value, Mapping) and value else [(name, str(value))]
    return rows
