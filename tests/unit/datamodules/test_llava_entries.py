from __future__ import annotations

import os

import pytest

from datamodules import llava_entries, shards
from datamodules.llava_entries import Shrink, make_entry, read_annotations
from datamodules.shards import conversation
from moextend_pl.contracts import UserError

TURNS = conversation(("<image>\nwhat?", "this"))


def problems_of(item, root, key="a"):
    return make_entry(item, key, root, Shrink()).problems


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"[]", "got an empty one"), (b'{"id": 1}\n{"id": 2\n', "line 2"), (b"{}", "got dict")],
)
def test_what_is_no_list_is_told_with_what_it_is(tmp_path, content, sentence):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_annotations(tmp_path / "data.json")


def test_a_file_that_begins_with_the_mark_of_windows_is_read(tmp_path):
    (tmp_path / "data.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_annotations(tmp_path / "data.json")[1] == [1]


def test_an_id_that_is_no_whole_number_is_told_with_what_it_is(tmp_path):
    item = {"id": 1.5, "conversations": conversation(("what?", "this"))}
    assert problems_of(item, tmp_path, "") == ["expected `id` to be a text or a whole number, got 1.5"]


def test_half_characters_are_a_problem_wherever_they_stand(tmp_path, picture):
    (tmp_path / "one.png").write_bytes(picture(1))
    half = "\ud83d"
    noted = [{**turn, "note": half} for turn in TURNS]
    assert problems_of({"id": "a", "image": "one.png", "conversations": TURNS}, tmp_path) == []
    for item, key in (
        ({"id": half, "image": "one.png", "conversations": TURNS}, half),
        ({"id": "a", "image": f"{half}.png", "conversations": TURNS}, "a"),
        ({"id": "a", "image": "one.png", "conversations": conversation(("<image>", half))}, "a"),
        ({"id": "a", "image": "one.png", "conversations": noted}, "a"),
    ):
        text = "; ".join(problems_of(item, tmp_path, key))
        assert "lone surrogate" in text or "UTF-8" in text
        text.encode()  # it can be printed


def test_what_is_too_large_to_be_read_again_is_a_problem_before_it_is_written(tmp_path, picture, monkeypatch):
    (tmp_path / "one.png").write_bytes(picture(1))
    size = len(picture(1))
    monkeypatch.setattr(shards, "MAX_TEXT_BYTES", 200)
    monkeypatch.setattr(llava_entries, "MAX_SAMPLE_BYTES", size + 1300)

    def found(answer, images):
        turns = conversation(("<image>" * images + "what?", answer))
        return problems_of({"id": "a", "image": ["one.png"] * images, "conversations": turns}, tmp_path)

    assert found("this", 1) == []
    assert "at most 200 bytes of `conversations`" in found("long" * 50, 1)[0]
    assert f"at most {size + 1300} bytes a sample" in found("this", 2)[0]
    (tmp_path / "one.png").write_bytes(bytes(size + 1301))
    assert f"found {size + 1301}" in found("this", 1)[0]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_an_image_that_is_no_plain_file_is_a_problem_and_nothing_to_wait_for(tmp_path, make):
    make(tmp_path / "one.png")
    item = {"id": "a", "image": "one.png", "conversations": TURNS}
    assert "found a folder or a device" in problems_of(item, tmp_path)[0]
