"""The page shows what was counted, in numbers that can be read, and no text of anybody is taken for HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from moextend_pl.export.demo.answers import Told
from moextend_pl.export.demo.conversation_html import TOLD_CELLS, ShownTurn, conversation_html, thumbnail, turn_html
from moextend_pl.export.demo.expert_map import ExpertMap
from moextend_pl.samples.messages import ask

EVIL = '<script>alert("x")</script> & <img src=x onerror=y>'
CHOSEN = ExpertMap(
    {"image": 4, "text": 5},
    {"image": {0: (4, 4), 2: (1, 3, 4)}, "text": {0: (10, 0), 2: (5, 5, 0)}},
    {0: 2, 2: 2},
)


class Cells(HTMLParser):
    """Reads the maps of a page: title, class and number of each cell, by kind and layer."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[tuple[str, int], list[tuple[str, str, str]]] = {}
        self.tags: list[str] = []
        self.kind, self.layer, self.cell = "", -1, False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.kind = given.get("data-kind", self.kind)
        self.layer = int(given.get("data-layer", self.layer))
        self.cell = tag == "i" and self.layer >= 0
        if self.cell:
            cells = self.found.setdefault((self.kind, self.layer), [])
            cells.append((given.get("title", ""), given.get("class", ""), ""))

    def handle_endtag(self, tag: str) -> None:
        self.cell = False

    def handle_data(self, data: str) -> None:
        if self.cell:
            cells = self.found[self.kind, self.layer]
            cells[-1] = (*cells[-1][:2], data)


def turn(**changes: object) -> ShownTurn:
    told = Told("red", ask("what ?", [Image.new("RGB", (9, 9))]), CHOSEN, "blue", "green")
    return ShownTurn(**{"question": "what ?", "told": told, **changes})  # type: ignore[arg-type]


def test_every_cell_is_the_share_of_its_expert() -> None:
    found = Cells(turn_html(turn())).found
    assert [cell[2] for cell in found["image", 0]] == ["50", "50", ""]
    assert [cell[2] for cell in found["image", 2]] == ["12", "38", "50"]
    assert [cell[2] for cell in found["text", 0]] == ["100", "0", ""]
    assert found["image", 2][2] == ("layer 2, new expert 2: 50.0%", "n7", "50")
    assert found["image", 0][2] == ("", "", "")
    assert found["text", 0][0][:2] == ("layer 0, expert 0: 100.0%", "o10")


def test_kinds_that_were_not_read_and_models_without_experts_have_no_map() -> None:
    words = ExpertMap({"image": 0, "text": 5}, CHOSEN.counts, CHOSEN.old)
    assert {kind for kind, _ in Cells(turn_html(turn(told=Told("a", ask("b"), words)))).found} == {"text"}
    dense = ExpertMap({"image": 2, "text": 5}, {"image": {}, "text": {}}, {})
    assert Cells(turn_html(turn(told=Told("a", ask("b"), dense)))).found == {}


def test_a_large_map_tells_no_cell_by_itself_and_stays_small() -> None:
    layers, experts = 48, 128
    counts = {layer: (*[8] * experts, 3) for layer in range(layers)}
    large = ExpertMap({"image": 9, "text": 0}, {"image": counts}, dict.fromkeys(counts, experts))
    page = turn_html(turn(told=Told("a", ask("b"), large)))
    assert layers * experts > TOLD_CELLS
    assert 'title="layer' not in page
    assert len(page) < 150_000


def test_texts_are_shown_as_they_are() -> None:
    told = Told(EVIL, ask("b", [Image.new("RGB", (9, 9))]), CHOSEN, EVIL, EVIL)
    for shown in (turn(question=EVIL, told=told), turn(question=EVIL, problem=EVIL)):
        page = turn_html(shown)
        assert "script" not in Cells(page).tags
        assert "onerror=y>" not in page
        assert page.count("&lt;script&gt;") >= 2


@pytest.mark.parametrize(
    ("told", "has_new", "expected"),
    [
        (Told("r"), True, []),
        (Told("r", ask("b", [Image.new("RGB", (9, 9))]), CHOSEN), True, ["mx-base", "mx-blind"]),
        (Told("r", ask("b"), CHOSEN, "x"), True, ["mx-base"]),
        (Told("r", ask("b"), CHOSEN), False, []),
    ],
)
def test_what_the_base_says_stands_there_where_it_is_another(told: Told, has_new: bool, expected: list[str]) -> None:
    page = turn_html(turn(told=told, has_new=has_new))
    assert re.findall(r'<dd class="(mx-\w+)"', page) == expected
    assert ("no new experts" in page) == (not has_new)
    assert ("mx-going" in page) == (told.said is None)


def test_the_newest_turn_stands_first_with_its_picture() -> None:
    picture = thumbnail(Image.new("RGB", (2000, 1000)))
    page = conversation_html([turn(question="first"), turn(question="second", pictures=(picture,))])
    assert page.index("second") < page.index("first")
    assert page.count("<img ") == 1
    assert len(picture) < 20_000
