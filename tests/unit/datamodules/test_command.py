from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.faulty_shards import bomb, conversation_json, plain_image, write_tar
from helpers.shaky_server import shaky_server
from PIL import Image

from datamodules import own_sets
from datamodules.command import main
from datamodules.index import INDEX_FILE
from datamodules.reader import ShardReader
from datamodules.scan import build_index
from datamodules.shards import conversation
from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import Turn


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
    assert "00000.tar: s00: expected the content that was indexed" in out  # the byte lay in this sample
    assert "5 problem(s)" in out


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
    monkeypatch.setattr(own_sets, "build_easy_vqa", lambda *arguments: calls.append(arguments) or built[1])
    assert main(["build", "easy-vqa", "--out", "some/data", "--samples-per-shard", "77"]) == 0
    assert calls == [(Path("some/data"), 77)]
    out = capsys.readouterr().out
    assert "vqa/test: 1 shards, 1000 samples, 1000 images, 9673 turns" in out
    captions = int(out.split("captions/test: 1 shards, ")[1].split()[0])
    assert f"test: {1000 - captions} of 1000 images are in vqa only" in out


def img2dataset(folder, count=5):
    folder.mkdir()
    for shard in range(2):
        members = []
        for n in range(shard * count, (shard + 1) * count):
            key = f"{n:09d}"
            facts = {"caption": f"colour {n}", "url": "https://x", "key": key, "status": "success", "width": 8}
            members += [(f"{key}.jpg", plain_image(n, kind="JPEG")), (f"{key}.txt", f"colour {n}".encode())]
            members.append((f"{key}.json", json.dumps(facts).encode()))
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def test_index_makes_conversations_of_img2dataset(tmp_path, capsys):
    folder = img2dataset(tmp_path / "set")
    assert main(["index", str(folder)]) == 0
    assert "2 shards, 10 samples, 10 images, 10 turns" in capsys.readouterr().out
    raw = ShardReader(folder).read(7)
    assert raw.turns == (Turn("<image>\nDescribe the image.", "colour 7"),)
    assert raw.images == (plain_image(7, kind="JPEG"),)
    assert main(["check", str(folder)]) == 0


def test_index_takes_plain_webdataset_with_captions_and_tells_what_cannot_be_used(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    members = [("a.jpg", plain_image(1, kind="JPEG")), ("a.txt", b"Ein Kreis.\n")]
    members += [("b.JPG", plain_image(2, kind="JPEG")), ("b.json", b'{"caption": "a <image> square"}')]
    members += [("c.png", plain_image(3)), ("d.txt", b""), ("d.png", plain_image(3))]
    write_tar(folder / "x.tar", members)
    assert main(["index", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "x.tar: c: expected a list `conversations`, or a caption; got no KEY.json and no KEY.txt" in out
    assert "x.tar: d: expected `conversations` or a caption" in out
    assert "2 sample(s) cannot be used" in out
    reader = ShardReader(folder)
    assert [reader.read(n).turns[0].gpt for n in (0, 1)] == ["Ein Kreis.", "a  square"]
    assert main(["check", str(folder)]) == 1
    assert "sound        2 of 4 samples" in capsys.readouterr().out


def test_index_renews_the_index_of_an_older_version(folder, capsys):
    (folder / INDEX_FILE).write_text('{"schema": 1, "shards": []}')
    with pytest.raises(UserError, match="schema: 2.*shards index"):
        main(["check", str(folder)])
    assert main(["index", str(folder)]) == 0
    assert main(["check", str(folder)]) == 0


def test_index_of_a_folder_without_shards_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cwd"):
        main(["index", str(tmp_path / "none")])
    with pytest.raises(UserError, match="0 shard.*Give the folder that holds them"):
        main(["index", str(tmp_path)])


def report_of(capsys, *arguments):
    code = main(["check", "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def test_check_as_json_counts_everything(folder, words, tmp_path, capsys):
    words.save_pretrained(tmp_path / "tokenizer")
    code, report = report_of(capsys, folder)
    assert code == 0
    lengths = [
        len("<image>\n" * (i % 3) + "what is the color ?blue") + i % 2 * len("is there a circle ?no") for i in range(11)
    ]
    assert report["length"] == {
        "p0": min(lengths),
        "p50": sorted(lengths)[5],
        "p95": report["length"]["p95"],
        "p100": max(lengths),
    }
    assert sum(report["length_histogram"].values()) == 11
    assert report["images_per_sample"] == {"0": 4, "1": 4, "2": 3}
    assert (report["formats"], report["sides"]) == ({"PNG": 10}, [8, 8])
    assert (report["samples"], report["sound_samples"], report["sound_shards"]) == (11, 11, 3)
    assert (report["supervised_ratio"], report["problems"]) == (None, [])
    code, report = report_of(capsys, folder, "--tokenizer", tmp_path / "tokenizer", "--tokens-per-image", 4)
    # <s> [INST] what is the color ? [/INST] blue </s>, then [INST] is there a circle ? [/INST] no </s>
    tokens = [10 + 4 * (i % 3) + i % 2 * 9 for i in range(11)]
    assert report["length"]["p100"] == max(tokens)
    assert report["supervised_ratio"] == pytest.approx(sum(2 + 2 * (i % 2) for i in range(11)) / sum(tokens))


@pytest.mark.parametrize("workers", [1, 3])
def test_check_finds_each_kind_of_fault_whatever_the_number_of_workers(tmp_path, capsys, workers):
    folder = tmp_path / "set"
    folder.mkdir()
    bad = {
        "cut": [("cut.json", conversation_json()), ("cut.png", plain_image()[:-30])],
        "large": [("large.json", conversation_json()), ("large.png", bomb())],
        "marks": [("marks.json", conversation_json("<image><image>?")), ("marks.png", plain_image())],
        "lost": [("lost.png", plain_image())],
        "silent": [("silent.json", conversation_json("q", " "))],
    }
    for shard, members in enumerate(bad.values()):
        good = [(f"good{shard}.json", conversation_json("q"))]
        write_tar(folder / f"{shard}.tar", [*good, *members])
    build_index(folder, faults=[])
    code, report = report_of(capsys, folder, "--workers", workers)
    assert code == 1
    assert [problem.split(": ")[:2] for problem in report["problems"]] == [
        [f"{shard}.tar", name] for shard, name in enumerate(bad)
    ]
    assert (report["sound_samples"], report["sound_shards"], report["samples"]) == (5, 5, 10)
    for sentence, problem in zip(
        ("cut short", "64000000 pixels", "2 `<image>` in the text for 1", "no KEY.json", "expected a text"),
        report["problems"],
        strict=True,
    ):
        assert sentence in problem


def test_check_tells_samples_without_a_token_to_learn(folder, words, tmp_path, capsys):
    words.save_pretrained(tmp_path / "tokenizer")
    code, report = report_of(capsys, folder, "--tokenizer", tmp_path / "tokenizer", "--max-length", 8)
    assert code == 1
    assert len(report["problems"]) == 11
    assert all("no supervised token" in problem for problem in report["problems"])


def test_check_draws_a_histogram(folder, capsys):
    main(["check", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["32-63", "#" * 40] for line in lines)


def test_check_and_show_read_remote_folders(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with shaky_server(folder) as server:
        assert main(["check", server.url, "--workers", "1"]) == 0
        assert "11 of 11 samples" in capsys.readouterr().out
        assert main(["show", server.url, "s05"]) == 0
        assert f"{server.url}/00001.tar: s05" in capsys.readouterr().out


def test_show_writes_the_pictures_side_by_side(folder, tmp_path, capsys):
    path = tmp_path / "out.png"
    assert main(["show", str(folder), "s05", "--png", str(path)]) == 0
    assert f"{path}: 2 image(s), 16 x 8" in capsys.readouterr().out
    sheet = Image.open(path)
    assert [sheet.getpixel((x, 4))[0] for x in (3, 11)] == [50, 51]
    with pytest.raises(UserError, match="no image"):
        main(["show", str(folder), "s00", "--png", str(path)])
    with pytest.raises(UserError, match="Expected to write"):
        main(["show", str(folder), "s05", "--png", str(tmp_path / "none" / "x.png")])


def test_build_llava_tells_sizes_and_new_keys_and_what_was_left_out(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(plain_image(1, (300, 200), "JPEG"))
    turns = conversation(("<image> what ?", "red"))
    items = [{"id": "x", "image": name, "conversations": turns} for name in ("a.jpg", "a.jpg", "none.jpg")]
    (tmp_path / "data.json").write_text(json.dumps(items))
    where = ["--json", str(tmp_path / "data.json"), "--images", str(tmp_path), "--out", str(tmp_path / "o")]
    with pytest.raises(UserError, match="--skip-bad"):
        main(["build", "llava", *where])
    options = ["--resize", "64", "--quality", "80", "--workers", "2", "--skip-bad", "--samples-per-shard", "1"]
    assert main(["build", "llava", *where, *options]) == 0
    out = capsys.readouterr().out
    assert "2 shards, 2 samples, 2 images, 2 turns" in out
    assert "2 entries got a key of their own" in out
    assert "MiB as files" in out
    assert "1 problem(s): see" in out
    assert main(["show", str(tmp_path / "o"), "x-2"]) == 0
    assert "JPEG 96 x 64 RGB" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "o")]) == 0


@pytest.mark.parametrize("arguments", [[], ["build"], ["nonsense"], ["check"]])
def test_wrong_arguments_exit_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err
