from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules import command
from datamodules.command import main
from datamodules.index import INDEX_FILE
from datamodules.shards import conversation
from moextend_pl.contracts import UserError


def test_check_of_good_shards_counts_and_returns_zero(folder, capsys):
    assert main(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "3 shards, 11 samples, 10 images, 16 turns" in out
    assert out.endswith("ok\n")


def test_check_names_what_is_wrong_and_returns_one(folder, capsys):
    data = bytearray((folder / "00000.tar").read_bytes())
    data[600] ^= 1
    (folder / "00000.tar").write_bytes(bytes(data))
    with (folder / "00001.tar").open("ab") as stream:
        stream.write(b"x")
    (folder / "00002.tar").rename(folder / "extra.tar")
    assert main(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    for sentence in ("00000.tar: the content differs", "00001.tar: the index says", "00002.tar: missing"):
        assert sentence in out
    assert "extra.tar: not in the index" in out
    assert "4 problem(s)" in out


def test_check_decodes_every_image(tmp_path, picture, capsys):
    from datamodules.shards import Entry, write_shards

    turns = conversation(("<image> what ?", "red"))
    write_shards([Entry("good", turns, (picture(1),)), Entry("bad", turns, (picture(2)[:-30],))], tmp_path)
    assert main(["check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "00000.tar: bad: the image is cut short" in out
    assert "1 problem(s)" in out


def test_check_compares_the_index_with_the_shard(folder, capsys):
    index = json.loads((folder / INDEX_FILE).read_text())
    index["shards"][0]["images"] += 1
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert main(["check", str(folder)]) == 1
    assert "00000.tar: the index lists other samples" in capsys.readouterr().out


def test_show_prints_the_conversation(folder, capsys):
    assert main(["show", str(folder), "s05"]) == 0
    out = capsys.readouterr().out
    assert "image 1: PNG 8 x 8 RGB" in out
    assert "human: <image>\n<image>\nwhat is the color ?\ngpt:   blue\n" in out
    assert "human: is there a circle ?\ngpt:   no\n" in out


def test_show_marks_what_is_learned(folder, words, tmp_path, capsys):
    words.save_pretrained(tmp_path / "tokenizer")
    options = ["show", str(folder), "s01", "--tokenizer", str(tmp_path / "tokenizer"), "--tokens-per-image", "3"]
    main([*options, "--color", "never"])
    plain = capsys.readouterr().out.splitlines()[-1]
    names = [part.rpartition(":")[0] for part in plain.split()]
    expected = "<s> [INST] _ what is the color ? [/INST] [blue [</s> [INST] is there a circle ? [/INST] [no [</s>"
    assert names == expected.replace("_", "").split(" ")
    assert plain.split()[2] == "<image>*3"
    main([*options, "--color", "always"])
    coloured = capsys.readouterr().out
    assert f"\033[32mblue:{words.convert_tokens_to_ids('blue')}\033[0m" in coloured
    assert "\033[90mwhat:" in coloured


def test_show_of_what_is_not_there_is_a_user_error(folder, tmp_path):
    with pytest.raises(UserError, match=r"such as s00.*'none'"):
        main(["show", str(folder), "none"])
    with pytest.raises(UserError, match="tokenizer"):
        main(["show", str(folder), "s00", "--tokenizer", str(tmp_path / "none")])


def test_build_llava_writes_a_folder_that_passes_the_check(tmp_path, picture, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(picture(1))
    items = [
        {"id": f"x{i}", "image": "a.png", "conversations": conversation(("<image> what ?", "red"))} for i in range(5)
    ]
    (tmp_path / "data.json").write_text(json.dumps(items))
    arguments = [
        "--json",
        str(tmp_path / "data.json"),
        "--images",
        str(tmp_path / "images"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(["build", "llava", *arguments, "--samples-per-shard", "2"]) == 0
    assert "3 shards, 5 samples, 5 images, 5 turns" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "o")]) == 0


def test_build_easy_vqa_tells_what_was_left_out(built, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(command, "build_easy_vqa", lambda *arguments: calls.append(arguments) or built[1])
    assert main(["build", "easy-vqa", "--out", "some/data", "--samples-per-shard", "77"]) == 0
    assert calls == [(Path("some/data"), 77)]
    out = capsys.readouterr().out
    assert "vqa/test: 1 shards, 1000 samples, 1000 images, 9673 turns" in out
    captions = int(out.split("captions/test: 1 shards, ")[1].split()[0])
    assert f"test: {1000 - captions} of 1000 images are in vqa only" in out


@pytest.mark.parametrize("arguments", [[], ["build"], ["nonsense"], ["check"]])
def test_wrong_arguments_exit_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err
