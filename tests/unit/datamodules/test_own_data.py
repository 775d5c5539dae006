"""Tables and folders of pictures become the samples that a person would write by hand."""

from __future__ import annotations

import csv
import json

import pytest
from helpers.faulty_shards import plain_image, write_tar

from datamodules.command import main
from datamodules.folders import UNDESCRIBED, UNKNOWN, UNSEEN
from datamodules.llava import build_shards
from datamodules.own_data import OwnData, hold_out, read_data
from datamodules.reader import ShardReader
from moextend_pl.contracts import UserError


def samples(place, out, **how):
    """Builds shards and returns (key, question, answer, number of images) of each sample, and what was left out."""
    built = build_shards(read_data(place, **how), out)
    reader = ShardReader(out)
    raws = [reader.read(number) for number in range(len(reader))]
    return [(raw.key, raw.turns[0].human, raw.turns[0].gpt, len(raw.images)) for raw in raws], built.done.dropped


def pictures(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(plain_image(number))


ROWS = [["a.png", "what, exactly?", 'a "circle"'], ["", "two\nlines", "yes"], ["sub/b.png", "left of <image>?", "no"]]
EXPECTED = [
    ("000000000", "<image>\nwhat, exactly?", 'a "circle"', 1),
    ("000000001", "two\nlines", "yes", 0),
    ("000000002", "left of <image>?", "no", 1),
]


@pytest.mark.parametrize(("name", "sign"), [("t.csv", ","), ("t.tsv", "\t"), ("t.csv", ";")])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "windows"])
def test_a_table_becomes_samples(tmp_path, name, sign, mark):
    pictures(tmp_path / "set", "a.png", "sub/b.png")
    with (tmp_path / "set" / name).open("w", encoding="utf-8", newline="") as stream:
        stream.write(mark)
        csv.writer(stream, delimiter=sign).writerows([["Image", "Question", "ANSWER"], *ROWS])
    for place in (tmp_path / "set" / name, tmp_path / "set"):
        assert samples(place, tmp_path / "out")[0] == EXPECTED


def test_rows_of_json_and_of_parquet_become_the_same_samples(tmp_path):
    pictures(tmp_path / "set", "a.png", "sub/b.png")
    rows = [dict(zip(("file_name", "prompt", "text"), row, strict=True)) for row in ROWS]
    (tmp_path / "set/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert samples(tmp_path / "set", tmp_path / "out")[0] == EXPECTED
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "set/metadata.jsonl").unlink()
    for inside in (False, True):  # as names, and as datasets of the hub hold them
        cells = [
            {"bytes": (tmp_path / "set" / n).read_bytes(), "path": n} if n and inside else n or None for n, *_ in ROWS
        ]
        table = [{**row, "file_name": cell} for row, cell in zip(rows, cells, strict=True)]
        parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "set/t.parquet")
        assert samples(tmp_path / "set/t.parquet", tmp_path / "out")[0] == EXPECTED


def test_parquet_without_its_package_names_it(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read_data(tmp_path / "t.parquet")


def test_columns_are_named_by_a_user_and_told(tmp_path, capsys):
    pictures(tmp_path, "a.png")
    (tmp_path / "t.csv").write_text("id,url,image,words\nx.1,a.png,none.png,red\n")
    arguments = ["build", "data", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--columns", "picture=url,answer=words", "--question", "Which colour?"]) == 0
    assert capsys.readouterr().out.startswith("columns: picture = url, answer = words\n")
    raw = ShardReader(tmp_path / "out").read(0)
    assert (raw.key, raw.turns[0].human, raw.turns[0].gpt) == ("x_1", "<image>\nWhich colour?", "red")
    for wrong, sentence in (("picture", "as picture=NAME"), ("picture=none", "expected a column 'none'")):
        with pytest.raises(UserError, match=sentence):
            main([*arguments, "--columns", wrong])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("image,question\na.png,what?\n", r"expected columns for .*, got image, question. Name them"),
        ("answer\nred\n", "expected columns for"),
        ("image,question,answer\na.png,what, exactly?,red\n", "line 2: expected 3 cells .*, got 4"),
        ("image,answer,answer\na.png,b,c\n", "different names"),
        ("image,answer\n", "at least one row"),
        ('image,answer\na.png,"red\n', "expected a table in UTF-8"),
        ("image,answer\na.png,r\udcffd\n", "expected a table in UTF-8"),
        ("image,answer\na.png,\n", "turn 1: expected a text"),
        ("image,answer\nnone.png,red\n", "found no file"),
    ],
)
def test_a_table_that_cannot_be_used_is_told(tmp_path, content, sentence):
    pictures(tmp_path, "a.png")
    (tmp_path / "t.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=sentence):
        samples(tmp_path / "t.csv", tmp_path / "out")


def test_a_folder_for_each_class_answers_with_its_name(tmp_path):
    pictures(tmp_path / "set", "red_cat/1.png", "dog/deep/x.1.png", "dog/x.1.JPG", ".hidden/a.png")
    (tmp_path / "set/dog/notes.md").write_text("notes")
    found, dropped = samples(tmp_path / "set", tmp_path / "out")
    asked = "<image>\nWhat is in the image?"
    assert found == [
        ("dog/deep/x_1", asked, "dog", 1),
        ("dog/x_1", asked, "dog", 1),
        ("red_cat/1", asked, "red cat", 1),
    ]
    assert dropped == {UNKNOWN: 1}


def test_a_text_of_the_same_name_is_the_answer(tmp_path):
    pictures(tmp_path / "set", "a.png", "b.png", "sub/c.webp", f"{'long' * 30}.png")
    (tmp_path / "set/a.txt").write_text("\ufeffa red circle\n", encoding="utf-8")
    (tmp_path / "set/sub/c.txt").write_text("blue <image>", encoding="utf-8")
    (tmp_path / f"set/{'long' * 30}.txt").write_text("green", encoding="utf-8")
    (tmp_path / "set/d.txt").write_text("of nothing")
    found, dropped = samples(tmp_path / "set", tmp_path / "out", question="What?")
    assert found == [
        ("a", "<image>\nWhat?", "a red circle", 1),
        ("000000001", "<image>\nWhat?", "green", 1),
        ("sub/c", "<image>\nWhat?", "blue", 1),
    ]
    assert dropped == {UNDESCRIBED: 1, UNSEEN: 1}


def test_a_place_that_is_no_data_is_told_with_what_would_be(tmp_path):
    pictures(tmp_path / "flat", "a.png")
    write_tar(tmp_path / "flat.tar", [])
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/0.tar", [])
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.csv", "b.json"):
        (tmp_path / "two" / name).touch()
    for name, sentence in {
        "flat": "expected a folder for each class, or a text `a.txt` beside `a.png`",
        "none": r"Expected a .json, .* found nothing \(cwd",
        "flat.tar": "found something else",
        "tars": "holds shards.*shards index",
        "empty": "Expected pictures",
        "two": "got a.csv, b.json. Name the one",
    }.items():
        with pytest.raises(UserError, match=sentence):
            read_data(tmp_path / name)


@pytest.mark.parametrize(("count", "held"), [(2, 1), (20, 8), (400, 20), (30_000, 1000)])
def test_whole_pictures_are_held_out_and_no_sample_is_lost(tmp_path, count, held):
    rows = "".join(f"{n}.png,is {ask}?,yes\n" for n in range(count) for ask in ("one", "two"))
    (tmp_path / "t.csv").write_text("image,question,answer\n" + rows)
    data = read_data(tmp_path / "t.csv")
    learned, measured = hold_out(data)
    names = [{item["image"] for item in part.items} for part in (learned, measured)]
    assert not names[0] & names[1]
    assert sorted(map(str, learned.items + measured.items)) == sorted(map(str, data.items))
    assert held <= len(names[1]) <= 1.25 * held
    assert learned.digest != measured.digest
    assert [part.items for part in hold_out(data)] == [learned.items, measured.items]


def test_one_picture_cannot_be_held_out(tmp_path):
    (tmp_path / "t.csv").write_text("image,question,answer\na.png,one?,yes\na.png,two?,no\n")
    with pytest.raises(UserError, match="at least two pictures"):
        hold_out(read_data(tmp_path / "t.csv"))


def test_columns_are_those_of_all_rows(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    rows = [{"question": "why?", "answer": "so"}, {"image": "a.png", "question": "what?", "answer": "this"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [item["image"] for item in read_data(tmp_path / "rows.jsonl").items] == [None, "a.png"]


def test_the_column_of_exactly_that_name_is_taken(tmp_path):
    (tmp_path / "rows.csv").write_text("question,Label,label\nwhat?,wrong,right\n")
    (item,) = read_data(tmp_path / "rows.csv", columns={"answer": "label"}).items
    assert item["conversations"][1]["value"] == "right"


def test_a_list_in_a_cell_is_told_and_not_learned_as_code(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "what?", "answer": ["yes", "no"]}))
    with pytest.raises(UserError, match="got 'str'"):
        build_shards(read_data(tmp_path / "rows.jsonl"), tmp_path / "shards")


def test_a_picture_inside_of_a_table_is_held_out_with_all_its_questions(tmp_path):
    pixels = [str(n).encode() for n in range(8)]
    items = [{"image": {"bytes": pixels[n % 8], "path": None}, "conversations": []} for n in range(48)]
    learned, measured = hold_out(OwnData(tmp_path, "", items, tmp_path))
    seen = [{item["image"]["bytes"] for item in part.items} for part in (learned, measured)]
    assert len(seen[0]) + len(seen[1]) == 8
    assert not seen[0] & seen[1]


def test_two_sets_need_two_folders(tmp_path, capsys):
    pictures(tmp_path / "pics" / "red", "a.png", "b.png")
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="Expected two folders as `--out` and `--val`"):
        main(["build", "data", str(tmp_path / "pics"), "--question", "what?", "--out", out, "--val", out])
