from __future__ import annotations

import pytest

from datamodules.shards import conversation
from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import Turn, conversation_problems, parse_turns, single_turn

GOOD = conversation(("<image>\nwhat?", "this"), ("and?", "that"))

SYSTEM = {"from": "system", "value": "Be brief."}


def test_a_system_text_belongs_to_the_first_turn_and_to_every_single_turn():
    assert conversation_problems([SYSTEM, *GOOD], 1) == []
    turns = parse_turns([SYSTEM, *GOOD], 1, "x")
    assert turns == (Turn("<image>\nwhat?", "this", "Be brief."), Turn("and?", "that"))
    assert single_turn(turns, 1, 1)[0] == Turn("<image>\nand?", "that", "Be brief.")
    assert single_turn(turns, 0, 1)[0] == turns[0]


def test_a_valid_conversation_has_no_problems_and_becomes_pairs():
    assert conversation_problems(GOOD, 1) == []
    assert parse_turns(GOOD, 1, "x") == (Turn("<image>\nwhat?", "this"), Turn("and?", "that"))


@pytest.mark.parametrize(
    ("conversations", "images", "sentence"),
    [
        (None, 0, "list of turns"),
        ([], 0, "list of turns"),
        (GOOD[:3], 1, "even number"),
        ([GOOD[1], GOOD[0]], 1, "expected it from 'human', got 'gpt'"),
        (["text", GOOD[1]], 0, "got 'str'"),
        (conversation(("<image>\n", "this")), 1, "expected a text"),
        (conversation(("what?", "  ")), 0, "turn 1: expected a text"),
        ([{"from": "human", "value": 3}, GOOD[1]], 0, "got 3"),
        (GOOD, 2, "1 `<image>` in the text for 2 image"),
        (GOOD, 0, "1 `<image>` in the text for 0 image"),
        (conversation(("what?", "an <image>")), 1, "stands in an answer"),
        ([SYSTEM, *GOOD[:1]], 1, "even number"),
        ([SYSTEM], 0, "even number"),
        ([GOOD[0], SYSTEM], 1, "got 'system'"),
        ([{"from": "system", "value": " "}, *GOOD], 1, "expected a text without `<image>` or `<sound>` from"),
        ([{"from": "system", "value": "<image> x"}, *GOOD], 2, "from 'system'"),
        ([{"from": "system", "value": "x\ud83d"}, *GOOD], 1, "from 'system', got a lone surrogate at character 1"),
        (conversation(("what?", "red \udc00")), 0, "turn 1: expected whole characters, got a lone surrogate"),
    ],
)
def test_each_mistake_is_named(conversations, images, sentence):
    assert any(sentence in problem for problem in conversation_problems(conversations, images))
    with pytest.raises(UserError, match=r"set/0.tar: k"):
        parse_turns(conversations, images, "set/0.tar: k")


def test_a_single_turn_without_marks_gets_all_images_at_its_start():
    turns = (Turn("<image><image> what?", "this"), Turn("and?", "that"))
    assert single_turn(turns, 1, 2) == (Turn("<image>\n<image>\nand?", "that"), (range(2), range(0)))


def test_a_single_turn_with_marks_keeps_its_own_images_only():
    turns = (Turn("<image> what?", "this"), Turn("<image> and <image>?", "that"), Turn("no marks", "x"))
    assert single_turn(turns, 0, 3) == (turns[0], (range(1), range(0)))
    assert single_turn(turns, 1, 3) == (turns[1], (range(1, 3), range(0)))
    assert single_turn((Turn("q", "a"),), 0, 0) == (Turn("q", "a"), (range(0), range(0)))
