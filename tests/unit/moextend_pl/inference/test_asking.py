"""`generate`: pictures by path and in lists, messages, many questions at once; the prompt is that of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.asked import extended, shown
from helpers.tiny_world import QUESTION, TinyWorld, picture, pixels_of

from moextend_pl.contracts import UserError
from moextend_pl.models.moextend import MoExtend
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.turns import Turn


@pytest.fixture(scope="module")
def model(tiny_world: TinyWorld) -> MoExtend:
    return extended(tiny_world)


def prompt_of(model: MoExtend, monkeypatch: pytest.MonkeyPatch, *asked: Any) -> Any:
    """Returns the batch that a question becomes."""
    batches: list[Any] = []
    monkeypatch.setattr(model, "answer", lambda batch, *_: batches.append(batch) or [""] * len(batch["keys"]))
    model.generate(*asked)
    return batches[-1]


def test_a_path_is_asked_about_as_the_picture_itself(model: MoExtend, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(picture(2))
    expected = model.generate(shown(2), QUESTION)
    for place in (tmp_path / "picture.png", str(tmp_path / "picture.png"), [tmp_path / "picture.png"]):
        assert model.generate(place, QUESTION) == expected


def test_many_questions_are_answered_in_their_order_about_one_picture_or_one_each(model: MoExtend) -> None:
    questions = [QUESTION, "is it red ?", QUESTION]
    about = [shown(0), None, [shown(1), shown(2)]]
    expected = [model.generate(*pair) for pair in zip(about, questions, strict=True)]
    for size in (1, 2, 16):
        assert model.generate(about, questions, batch_size=size) == expected
    one = [model.generate(shown(1), question) for question in questions]
    assert model.generate(shown(1), questions) == one
    assert model.generate([], []) == []


def test_messages_are_encoded_as_the_conversations_of_the_data(
    model: MoExtend, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = {"type": "image", "image": shown(0)}
    url = {"type": "image_url", "image_url": {"url": shown(1)}}
    messages = [
        {"role": "system", "content": "a small picture ."},
        {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "text", "text": "is it"}, url, {"type": "text", "text": "blue ?"}]},
    ]
    batch = prompt_of(model, monkeypatch, messages)
    turns = (Turn(f"<image>\n{QUESTION}", "red", "a small picture ."), Turn("is it\n<image>\nblue ?", "no"))
    spec = model.sample_spec()
    pixels = [pixels_of(picture(n), spec.image_size) for n in (0, 1)]
    sample = ConversationEncoder(spec).encode_prompt("x", turns, pixels, ["a", "b"])
    assert batch["input_ids"].tolist() == [sample.input_ids.tolist()]
    assert (batch["pixel_values"] - sample.pixel_values).abs().max() < 1e-5


def test_messages_and_pictures_with_a_question_give_the_same_answer(model: MoExtend) -> None:
    parts = [{"type": "image", "image": shown(n)} for n in (0, 1)] + [{"type": "text", "text": QUESTION}]
    conversation = [{"role": "user", "content": parts}]
    expected = model.generate([shown(0), shown(1)], QUESTION)
    assert model.generate(conversation) == expected
    text = [{"role": "user", "content": QUESTION}]
    assert model.generate([conversation, text]) == [expected, model.generate(None, QUESTION)]


USER, ASSISTANT = ({"role": role, "content": "what ?"} for role in ("user", "assistant"))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("picture.png",), "or a question beside the picture, got str alone"),
        (([],), "got list alone"),
        (([USER, ASSISTANT],), "'user' first and last"),
        (([ASSISTANT, USER],), "'user' first and last"),
        (([USER, USER],), "got \\['user', 'user'\\]"),
        (([{"role": "system", "content": "x"}],), "'user' first and last"),
        (([{"role": "user", "content": 3}],), "Expected a text as content"),
        (([{"role": "user", "content": [{"type": "video"}]}],), "Expected a text as content"),
        (([{"role": "user", "content": [{"type": "image"}]}],), "a picture, a path"),
        (([{"role": "user", "content": "<image>"}],), "without <image>"),
        (([USER, {"role": "assistant", "content": [{"type": "image", "image": "a"}]}, USER],), "from 'user' only"),
        ((None, " "), "empty text"),
        ((3, QUESTION), "a picture, a path .* got int"),
        (([None, None], [QUESTION]), "as many entries of pictures as questions, got 2 for 1"),
        (("nowhere.png", QUESTION), "found no file"),
        (([["red"]],), "Expected messages such as"),
    ],
)
def test_what_is_no_question_is_told_in_one_sentence(model: MoExtend, asked: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        model.generate(*asked)
    assert "\n" not in str(caught.value)


def test_there_is_no_batch_of_nothing(model: MoExtend) -> None:
    with pytest.raises(UserError, match="`batch_size` of at least 1"):
        model.generate(None, QUESTION, batch_size=0)
