"""A conversation as HTML: beside each answer the map of its experts and what the base says; every text is escaped."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from moextend_pl.export.demo.answers import Told
from moextend_pl.export.demo.expert_map import ExpertMap
from moextend_pl.export.demo.page_style import SHADES

THUMBNAIL = 320  # pixels of the longer side

NUMBERED = (16, 12)  # layers and experts of each, up to which shares are written into the map
TOLD_CELLS = 1500  # of a map; above it the single cell is not told on hover, which would be most of the page
KIND_NAMES = {"image": "Picture", "text": "Text"}
ANSWERING = "is answering"

BASE = (
    "The base alone, shown the picture",
    "Same words and pictures, seen through this run's tower and projector; only the base's own experts answer.",
)
BASE_OF_TEXT = ("The base alone", "Same words; only the base's own experts answer.")
BLIND = ("The base alone, words only", "Same words without any picture: what the language model says as it came.")
HISTORY = "Earlier turns stand as they are on this page."
NO_NEW = "This run has no new experts: what answers is the base with the run's tower and projector."
LEARNED = "The base's own weights learned in this run, so that it cannot be asked beside it."

NOTHING = Told("")


@dataclass(frozen=True)
class ShownTurn:
    """One question as it is shown.

    Attributes:
        question: Its words.
        pictures: Addresses of what was shown with it, see `thumbnail`.
        told: How far its answer is.
        has_new: Whether the model has experts that the base has not.
        keeps_base: Whether the base's own weights are as they came.
        problem: Why it cannot be answered.
    """

    question: str
    pictures: tuple[str, ...] = ()
    told: Told = NOTHING
    has_new: bool = True
    keeps_base: bool = True
    problem: str = ""


def thumbnail(picture: Image.Image) -> str:
    """Returns a small copy of a picture as `data:` address."""
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def conversation_html(turns: Sequence[ShownTurn]) -> str:
    """Returns turns, the newest one first."""
    return "".join(map(turn_html, reversed(turns)))


def turn_html(turn: ShownTurn) -> str:
    """Returns one question with its answer, or why there is none, and what stands beside it."""
    pictures = "".join(f'<img src="{address}" alt="picture of this question">' for address in turn.pictures)
    asked = f'<div class="mx-asked">{pictures}<p>{escape(turn.question)}</p></div>'
    if turn.problem:
        return (
            f'<article class="mx-turn">{asked}<p class="mx-problem" role="alert">{escape(turn.problem)}</p></article>'
        )
    told = turn.told
    state = "mx-answer" if told.said else f'mx-answer mx-going" aria-label="{ANSWERING}'
    answer = f'<p class="{state}">{escape(told.answer)}</p>'
    left = f'<div class="mx-said">{asked}{answer}{_base(turn)}</div>'
    return f'<article class="mx-turn">{left}{_maps(told.chosen)}</article>'


def _base(turn: ShownTurn) -> str:
    told = turn.told
    if told.said is None:
        return ""
    if not turn.has_new or not turn.keeps_base:
        return f'<p class="mx-note">{NO_NEW if turn.keeps_base else LEARNED}</p>'
    with_picture = bool(told.said.pictures)
    rows = [("mx-base", BASE if with_picture else BASE_OF_TEXT, told.base)]
    if with_picture:
        rows.append(("mx-blind", BLIND, told.blind))
    each = "".join(
        f'<dt title="{escape(how)}">{escape(name)}</dt><dd class="{kind}">'
        f"{'<i>…</i>' if answer is None else escape(answer) or '<i>nothing</i>'}</dd>"
        for kind, (name, how), answer in rows
    )
    hows = " ".join(escape(f"{name}: {how[0].lower()}{how[1:]}") for _, (name, how), _ in rows)
    details = f'<details class="mx-note"><summary>What that means</summary>{hows} {HISTORY}</details>'
    return f'<dl class="mx-others">{each}</dl>{details}'


def _maps(chosen: ExpertMap | None) -> str:
    if chosen is None or not chosen.old:
        return '<div class="mx-maps"></div>'
    shown = [kind for kind in KIND_NAMES if chosen.tokens[kind]]
    largest = max(max(chosen.shares(kind, layer)) for kind in shown for layer in chosen.old) or 1.0
    maps = "".join(_map(chosen, kind, largest) for kind in shown)
    legend = (
        '<p class="mx-note">Rows are layers, columns experts: <b class="mx-old">the base\'s own</b>, then '
        f'<b class="mx-new">new ones</b>. Share of a layer\'s choices, the darkest {largest:.0%}. '
        "Text tokens include the answer.</p>"
    )
    return f'<div class="mx-maps">{maps}{legend}</div>'


def _map(chosen: ExpertMap, kind: str, largest: float) -> str:
    old = max(chosen.old.values())
    new = max(len(counts) - chosen.old[layer] for layer, counts in chosen.counts[kind].items())
    layers = len(chosen.old)
    detail = (layers * (old + new) <= TOLD_CELLS) + (layers <= NUMBERED[0] and old + new <= NUMBERED[1])
    rows = "".join(_row(chosen, kind, layer, (old, new, largest, detail)) for layer in chosen.old)
    count = chosen.tokens[kind]
    head = f"<figcaption>{KIND_NAMES[kind]} tokens <span>{count:,} read</span></figcaption>"
    style = f"--old:{old};--new:{new};--rows:{layers}"
    return f'<figure class="mx-map" data-kind="{kind}" style="{style}">{head}{rows}</figure>'


def _row(chosen: ExpertMap, kind: str, layer: int, shape: tuple[int, int, float, int]) -> str:
    """Returns one layer: a cell for each expert of the widest layer, with nothing where this one has none."""
    old, new, largest, detail = shape
    shares, own = chosen.shares(kind, layer), chosen.old[layer]
    padded = [*shares[:own], *[None] * (old - own), *shares[own:], *[None] * (new - (len(shares) - own))]
    cells = []
    for place, share in enumerate(padded):
        is_new = place >= old
        if share is None:
            cells.append("<i></i>")
            continue
        shade = round(SHADES * math.sqrt(share / largest))  # small shares of many experts are seen as well
        number = f"{100 * share:.0f}" if detail > 1 else ""
        expert = place - old + own if is_new else place
        name = f"layer {layer}, {'new ' if is_new else ''}expert {expert}: {share:.1%}"
        hover = f' title="{name}"' if detail else ""
        cells.append(f'<i class="{"n" if is_new else "o"}{shade}"{hover}>{number}</i>')
    gap = "<u></u>" if new else ""
    share_of_new = f"{chosen.new_share(kind, layer):.0%}" if len(shares) > own else ""
    tail = f'<b title="share of new experts">{share_of_new}</b>' if new else ""
    body = f"{''.join(cells[:old])}{gap}{''.join(cells[old:])}"
    return f'<div class="mx-row" data-layer="{layer}"><s>{layer}</s>{body}{tail}</div>'
