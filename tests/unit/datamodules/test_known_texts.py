"""Known texts: what is held out is not learned from, and a missing wheel is told of."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.known_texts import CHARACTERS, capitals, continents, held_out, passages, wheel
from moextend_pl.contracts import UserError

TEXTS = [f"text {number} " + f"says {number} again and again, " * 30 for number in range(6)]
FACTS = [
    {"name": name, "capital": capital, "region": region}
    for name, capital, region in (
        ("A", "a", "North"), ("B", "b", "South"), ("C", "c", "North"), ("D", "d", "South"), ("E", ["e", "f"], ""),
    )
]  # fmt: skip


def test_nothing_is_learned_from_what_is_held_out() -> None:
    kept = held_out(TEXTS)
    assert 0 < len(kept) <= CHARACTERS + 10
    learned = list(passages(TEXTS))
    assert len(learned) == 3
    assert all(f"says {number} again" in kept for number in (0, 2, 4))
    assert all(rest not in kept for _, rest in learned)
    assert f"{learned[0][0]} {learned[0][1]}" == TEXTS[1][:600]


def test_questions_have_the_right_end_where_they_say() -> None:
    asked = capitals(FACTS)
    assert [each["choices"][each["answer"]] for each in asked] == ["a", "b", "c", "d"]
    assert all(len(set(each["choices"])) == 4 for each in asked)
    assert asked == capitals(FACTS)
    assert [each["choices"][each["answer"]] for each in continents(FACTS)] == ["North", "South", "North", "South"]


def test_missing_or_damaged_wheel_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pip download --no-deps -d"):
        wheel(tmp_path, "countryinfo")
    (tmp_path / "countryinfo-1.0.1-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(UserError, match="is no wheel"):
        wheel(tmp_path, "countryinfo")
