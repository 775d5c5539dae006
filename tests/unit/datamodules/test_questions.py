"""Samples of shards become a test set that `evaluate --tasks own` reads: what each asks first, and its picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_world import picture

from datamodules.command import main
from datamodules.questions import write_questions
from datamodules.shards import Entry, conversation, write_shards
from moextend_pl.contracts import UserError
from moextend_pl.evaluation.layouts import own


def entries() -> list[Entry]:
    turns = conversation(("<image>\nwhat is it?", "red"), ("sure?", "yes"))
    several = conversation(("<image><image>\nwhich?", "both"))
    told = [{"from": "system", "value": "be short"}, *conversation(("why?", "so"))]
    return [
        Entry("a", turns, (picture(0),)),
        Entry("b", conversation(("is blue a color?", "yes"))),
        Entry("c", several, (picture(1), picture(2))),
        Entry("d", told),
    ]


def test_what_is_asked_first_is_written_with_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(entries(), tmp_path, 2)
    assert main(["questions", str(tmp_path), "--out", str(tmp_path / "own")]) == 0
    found = list(own(tmp_path / "own"))
    assert [(q.key, q.prompt, q.truth) for q in found] == [
        ("a", "what is it?", ["red"]),
        ("b", "is blue a color?", ["yes"]),
    ]
    assert (Path(found[0].picture).read_bytes(), found[1].picture) == (picture(0), "")
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("own: 2 questions")
    assert {line.removeprefix("left out: ") for line in said[1:]} == {
        "1 later questions of conversations",
        "1 samples with several pictures",
        "1 samples with instructions",
    }


def test_a_limit_spreads_over_the_set_and_nothing_to_ask_is_told(tmp_path: Path) -> None:
    write_shards([Entry(str(n), conversation((f"{n}?", "yes"))) for n in range(10)], tmp_path, 4)
    for limit, keys in ((2, "05"), (6, "013568"), (99, "0123456789")):
        assert write_questions(tmp_path, tmp_path / "own", limit)[0] == len(keys)
        assert [question.key for question in own(tmp_path / "own")] == list(keys)
    (tmp_path / "none").mkdir()
    write_shards(entries()[2:], tmp_path / "none", 2)
    with pytest.raises(UserError, match="expected samples with one question about one picture or none"):
        write_questions(tmp_path / "none", tmp_path / "x", 5)
    with pytest.raises(UserError, match="Expected `--limit` of at least 1, got 0"):
        main(["questions", str(tmp_path), "--out", str(tmp_path / "y"), "--limit", "0"])
