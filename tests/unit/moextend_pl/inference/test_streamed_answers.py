"""A stream: its pieces are the answer, it tells nothing that it would have to take back, and ends with its listener."""

from __future__ import annotations

import itertools

import pytest
from helpers.asked import endless, passes, shown
from helpers.tiny_world import QUESTION, TinyWorld, make_plan

from moextend_pl.contracts import UserError
from moextend_pl.inference.streaming import cut, settled, stream


@pytest.mark.parametrize("stop", [(), ("zz",), ("User:", "Use"), ("\n\n", " end")])
def test_what_is_told_is_the_beginning_of_every_way_to_go_on(stop: tuple[str, ...]) -> None:
    pieces = ["  a", " Us", "er", ":", "\n", " end", "\ufffd", "z "]
    for length in range(1, 5):
        for text in itertools.product(pieces, repeat=length):
            told = [settled("".join(text[:n]), stop) for n in range(1, length + 1)]
            final = cut("".join(text), stop).strip()
            assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(told))
            assert final.startswith(told[-1])
            is_over = cut("".join(text), stop) != "".join(text)
            assert is_over or not told[-1].endswith("\ufffd")


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 3}, {"max_new_tokens": 1}])
def test_pieces_joined_are_the_answer(tiny_world: TinyWorld, options: dict[str, object]) -> None:
    model = endless(tiny_world)
    whole = str(model.generate(None, QUESTION, **options))
    pieces = list(model.generate(None, QUESTION, stream=True, **options))
    assert "".join(pieces) == whole
    assert len(pieces) > 1 or options.get("max_new_tokens") == 1
    word = whole.split()[-1]
    stopped = model.generate(None, QUESTION, stream=True, stop=word, **options)
    assert "".join(stopped) == whole[: whole.index(word)].strip()


def test_a_mistake_is_raised_when_asked_and_one_of_the_work_where_it_is_heard(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(init="copy"))
    for options in ({"beams": 2}, {"temperature": -1.0}):
        with pytest.raises(UserError):
            model.generate(None, QUESTION, stream=True, **options)
    with pytest.raises(UserError, match="Expected one question for `stream`, got 2"):
        model.generate(None, [QUESTION] * 2, stream=True)

    def work(tell: object) -> None:
        tell("first")
        raise RuntimeError("broken")

    heard = stream(work)
    assert next(heard) == "first"
    with pytest.raises(RuntimeError, match="broken"):
        next(heard)


def test_the_work_ends_when_nobody_listens_any_more_and_leaves_no_mask_behind(tiny_world: TinyWorld) -> None:
    model = endless(tiny_world)
    count = passes(model)
    answer = model.generate(shown(0), QUESTION, stream=True, max_new_tokens=90)
    next(answer)
    answer.close()
    assert count["all"] < 90
    assert all(reach.nowhere for _, reach in model.language.extensions)


def test_questions_asked_beside_a_stream_wait_for_it(tiny_world: TinyWorld) -> None:
    model = endless(tiny_world)
    options: tuple[dict[str, str], ...] = ({}, {"reduce": "aim:0,2,0"})
    alone = [model.generate(shown(1), QUESTION, **how) for how in options], model.generate(None, QUESTION)
    for how, expected in zip(options, alone[0], strict=True):
        pieces, beside = "", set()
        for piece in model.generate(shown(1), QUESTION, stream=True, **how):
            pieces += piece
            beside.add(model.generate(None, QUESTION))
        assert (pieces, beside) == (expected, {alone[1]})
