"""The same conversation, written as LLaVA, ShareGPT and OpenAI write it, is the same sample."""

from __future__ import annotations

import base64
import json

import pytest
from helpers.faulty_shards import conversation_json, plain_image, write_tar

from datamodules.command import main
from datamodules.dialects import UNANSWERED, UNASKED, UNSHOWN, UNTOLD, spoken
from datamodules.llava import build_from_llava
from datamodules.llava_entries import Shrink, make_entry
from datamodules.reader import ShardReader
from datamodules.scan import build_index
from datamodules.shards import conversation
from moextend_pl.contracts import UserError

TURNS = conversation(("<image>\nwhat?", "this"), ("and?", "that"))
ADDRESS = "data:image/png;base64," + base64.b64encode(plain_image(3)).decode()


def said(role, value, speaker="from", text="value"):
    return {speaker: role, text: value}


def message(role, content):
    return said(role, content, "role", "content")


def shown(url, kind="image_url"):
    return {"type": kind, kind: {"url": url} if kind == "image_url" else url}


def text_part(text):
    return {"type": "text", "text": text}


OPENAI = [
    message("user", [shown("one.png"), text_part("what?")]),
    message("assistant", "this"),
    message("user", "and?"),
    message("assistant", [text_part("that")]),
]

QWEN = message("user", [shown("one.png", "image"), text_part("what?")])
CALLED = {"human": "user", "gpt": "assistant"}


@pytest.mark.parametrize(
    "item",
    [
        {"id": "a", "image": "one.png", "conversations": TURNS},
        {"id": "a", "images": ["one.png"], "conversations": TURNS},
        {"id": "a", "image": "one.png", "conversations": [said(CALLED[t["from"]], t["value"]) for t in TURNS]},
        {"id": "a", "image": ["one.png"], "messages": [message(CALLED[t["from"]], t["value"]) for t in TURNS]},
        {"id": "a", "messages": OPENAI},
        {"id": "a", "image": "", "messages": [QWEN, *OPENAI[1:]]},
        {"id": "a", "messages": [message("system", ""), *OPENAI]},
    ],
    ids=["llava", "images", "sharegpt", "messages-with-marks", "openai", "qwen", "empty-system"],
)  # fmt: skip
def test_every_dialect_gives_the_same_sample(item, tmp_path):
    (tmp_path / "one.png").write_bytes(plain_image(3))
    made = make_entry(item, "a", tmp_path, Shrink())
    assert made.problems == []
    assert made.entry.conversations == TURNS
    assert made.entry.images == (plain_image(3),)


def test_an_address_that_holds_the_image_and_one_that_names_a_file_give_its_bytes(tmp_path):
    (tmp_path / "one.png").write_bytes(plain_image(3))
    for url in (ADDRESS, f"file://{tmp_path}/one.png", str(tmp_path / "one.png")):
        item = {"messages": [message("user", [text_part("what?"), shown(url)]), message("assistant", "this")]}
        made = make_entry(item, "a", tmp_path, Shrink())
        assert made.problems == []
        assert made.entry.images == (plain_image(3),)
        assert made.entry.conversations == conversation(("what?\n<image>", "this"))


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("https://example.org/a.png", "expected a file or a `data:` address, got 'https://example.org/a.png'"),
        ("data:image/png,abc", "expected `data:image/...;base64,`"),
        ("data:image/png;base64,@@@@", "expected base64"),
        ("data:image/png;base64," + "QUJD" * 999, "expected an image as PNG"),
        ("file:///etc/passwd", "Absolute names"),
        ("../one.png", "`..` are refused"),
        (None, "expected the name of an image, got None"),
    ],
)
def test_an_image_that_cannot_be_had_is_told_in_few_words(url, sentence, tmp_path):
    item = {"messages": [message("user", [text_part("what?"), shown(url)]), message("assistant", "this")]}
    (problem,) = make_entry(item, "a", tmp_path, Shrink()).problems
    assert sentence in problem
    assert len(problem) < 400


def test_what_has_no_question_or_no_answer_is_left_out_with_its_images_and_counted():
    turns = [
        said("system", ""),
        said("gpt", "Hello!"),
        said("assistant", "How can I help?"),
        *TURNS,
        said("human", "<image> and <image>?"),
    ]
    found = spoken({"image": ["a", "b", "c"], "conversations": turns})
    assert found.conversations == TURNS
    assert found.images == ["a"]
    assert found.dropped == {UNTOLD: 1, UNASKED: 2, UNANSWERED: 1, UNSHOWN: 2}


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ({"conversations": TURNS, "messages": OPENAI}, "expected one of `conversations`, `messages`, got both"),
        ({"messages": [message("user", [{"type": "input_audio"}]), OPENAI[1]]}, "got 'input_audio'"),
        ({"messages": [OPENAI[2], {**OPENAI[1], "tool_calls": [1]}]}, "`tool_calls`"),
        ({"messages": [OPENAI[2], message("tool", "3"), OPENAI[1]]}, "got 'tool'"),
        ({"messages": [OPENAI[2], OPENAI[2], OPENAI[1]]}, "even number"),
        ({"conversations": [said("gpt", "an <image>"), *TURNS]}, "expected it from 'human', got 'gpt'"),
        ({"conversations": TURNS[:1]}, "list of turns under `conversations`, got none"),
        ({"conversations": [said("human", "<image>\nwhat?"), TURNS[1]], "image": ""}, "1 `<image>` in the text for 0"),
        ({"conversations": conversation(("<video>\nwhat?", "this"))}, "`<video>` stands in the text; videos are not"),
        ({"conversations": conversation(("what?", "this")), "video": "a.mp4"}, "got a `video`; videos are not"),
        ({"conversations": [said(["human"], "x"), TURNS[1]]}, "got ['human']"),
    ],
)
def test_what_no_rule_covers_stays_a_problem(item, sentence, tmp_path):
    (tmp_path / "one.png").write_bytes(plain_image(3))
    assert any(sentence in problem for problem in make_entry(item, "a", tmp_path, Shrink()).problems)


def test_lines_give_the_same_shards_as_a_list(tmp_path):
    items = [{"conversations": conversation((f"what {n}\u2028?", "this\x85"))} for n in range(5)]
    (tmp_path / "list.json").write_text(json.dumps(items))
    lines = "\n\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    (tmp_path / "lines.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    contents = []
    for name in ("list.json", "lines.jsonl", "lines.json"):
        built = build_from_llava(tmp_path / name, tmp_path, tmp_path / "out")
        assert list(built.shards[0].keys) == [f"00000000{n}" for n in range(5)]
        assert (built.unnamed, built.renamed) == (5, 0)
        contents.append((tmp_path / "out/00000.tar").read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_one_line_is_one_entry_and_a_broken_line_is_named(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": OPENAI[2:]}))
    assert len(build_from_llava(tmp_path / "one.jsonl", tmp_path, tmp_path / "out").shards[0]) == 1
    (tmp_path / "broken.jsonl").write_text('{"id": 1}\n{"id": 2\n')
    with pytest.raises(UserError, match=r"broken.jsonl: line 2: expected one JSON entry"):
        build_from_llava(tmp_path / "broken.jsonl", tmp_path, tmp_path / "out")


def test_the_command_tells_what_was_left_out(tmp_path, capsys):
    items = [
        {"id": "a", "conversations": [said("gpt", "Hi"), *conversation(("what?", "this"))]},
        {"conversations": [*conversation(("what?", "this")), said("human", "and?")], "image": ""},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, items)))
    where = ["--json", str(tmp_path / "data.jsonl"), "--images", str(tmp_path), "--workers", "1"]
    assert main(["build", "llava", *where, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "1 entries have no id and are named by their number" in out
    assert f"left out: 1 {UNASKED}\nleft out: 1 {UNANSWERED}\n" in out
    assert [len(ShardReader(tmp_path / "out").read(number).turns) for number in range(2)] == [1, 1]


def test_a_video_in_shards_of_others_is_refused_by_name(tmp_path):
    facts = {"conversations": conversation(("what?", "this")), "video": "a.mp4"}
    members = [("k1.json", json.dumps(facts).encode()), ("k2.json", conversation_json("<video>\nwhat ?"))]
    write_tar(tmp_path / "0.tar", members)
    faults: list[str] = []
    build_index(tmp_path, faults)
    assert "0.tar: k1: expected images or texts, got a `video`" in faults[0]
    reader = ShardReader(tmp_path)
    for number, named in enumerate(("`video`", "`<video>`")):
        with pytest.raises(UserError, match=f"{named}.*videos are not supported"):
            reader.read(number)
