from __future__ import annotations

import json

import pytest
import webdataset

from datamodules.llava import build_from_llava
from datamodules.shards import conversation
from moextend_pl.contracts import UserError

TURNS = conversation(("<image>\nwhat?", "this"))


def llava(tmp_path, items):
    (tmp_path / "data.json").write_text(json.dumps(items))
    return tmp_path / "data.json", tmp_path, tmp_path / "out"


def test_llava_json_becomes_shards(tmp_path, picture):
    (tmp_path / "one.png").write_bytes(picture(1))
    (tmp_path / "two.txt").write_bytes(picture(2, kind="JPEG"))  # a wrong name; the content decides
    two = conversation(("<image><image> which?", "both"))
    items = [
        {"id": "a", "image": "one.png", "conversations": TURNS},
        {"id": 7, "image": ["one.png", "two.txt"], "conversations": two},
        {"id": "c", "conversations": conversation(("hello", "you"))},
    ]
    build_from_llava(*llava(tmp_path, items))
    found = list(webdataset.WebDataset(str(tmp_path / "out/00000.tar"), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == ["a", "7", "c"]
    assert found[1]["0.png"] == picture(1)
    assert found[1]["1.jpg"] == picture(2, kind="JPEG")
    assert json.loads(found[1]["json"])["conversations"] == two


def test_all_mistakes_of_a_llava_json_are_told_at_once_and_nothing_is_written(tmp_path, picture):
    (tmp_path / "one.png").write_bytes(picture(1))
    (tmp_path / "cut.png").write_bytes(picture(1)[:-30])
    items = [
        {"id": "missing", "image": "none.png", "conversations": TURNS},
        {"id": "count", "image": ["one.png", "one.png"], "conversations": TURNS},
        {"id": "odd", "image": "one.png", "conversations": TURNS[:1]},
        {"id": "empty", "image": "one.png", "conversations": conversation(("<image>\nwhat?", ""))},
        {"id": "fine", "image": "one.png", "conversations": TURNS},
        {"id": "fine", "image": "one.png", "conversations": TURNS},
        {"id": "broken", "image": "cut.png", "conversations": TURNS},
        {"id": "outside", "image": "../one.png", "conversations": TURNS},
        {"image": "one.png", "conversations": TURNS},
        "no entry",
    ]
    with pytest.raises(UserError) as caught:
        build_from_llava(*llava(tmp_path, items))
    text = str(caught.value)
    expected = ["found no file", "1 `<image>` in the text for 2", "even number", "expected a text"]
    for sentence in [*expected, "cut short", "'../one.png'", "expected `id`", "expected an object", "8 problem(s)"]:
        assert sentence in text
    assert "entry 4" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.png", "data.json", "one.png"]


def test_at_most_twenty_mistakes_are_listed_and_the_rest_counted(tmp_path):
    items = [{"id": f"x{i}", "conversations": []} for i in range(33)]
    with pytest.raises(UserError, match="33 problem") as caught:
        build_from_llava(*llava(tmp_path, items))
    assert str(caught.value).count("entry ") == 20
    assert "13 more" in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff\xfe"])
def test_an_unusable_llava_json_is_refused(tmp_path, content):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data.json"):
        build_from_llava(tmp_path / "data.json", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="cwd"):
        build_from_llava(tmp_path / "none.json", tmp_path, tmp_path / "out")


def test_a_folder_with_other_things_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    items = [{"id": "a", "conversations": conversation(("q", "a"))}]
    with pytest.raises(UserError, match="something else"):
        build_from_llava(*llava(tmp_path, items))
    assert (tmp_path / "out/thesis.tex").read_text() == "years of work"
    (tmp_path / "out/thesis.tex").unlink()
    build_from_llava(*llava(tmp_path, items))  # an empty folder, then one of ours, may be replaced
    build_from_llava(*llava(tmp_path, items))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "out"]
