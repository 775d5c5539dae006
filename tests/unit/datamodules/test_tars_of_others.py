"""Tars that others wrote: webdataset's own reader says which members make a sample."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import pytest
import webdataset
from helpers.faulty_shards import conversation_json, plain_image, write_tar

from datamodules import ImageTextShards
from datamodules.command import main
from datamodules.index import load_index
from datamodules.members import is_used, split_member
from datamodules.reader import ShardReader
from datamodules.scan import build_index, index_shard
from moextend_pl.contracts import UserError

NAMES = [
    "a.jpg", "a.json", "a.cls", "dir.x/b.v1.jpg", "dir.x/b.json", "README", "__meta__", "__facts__/x.json",
    "c.npy", "d/.hidden.png", "e.seg.png", "e.png", "e.0.png", "e.JSON", ".DS_Store", "x/README", "f..json", "g.",
    "h/i/j.tar.gz", "__x.json", "k.txt", "k.webp",
]  # fmt: skip


def test_keys_and_extensions_are_webdatasets(tmp_path):
    write_tar(tmp_path / "0.tar", [(name, name.encode()) for name in NAMES])
    found = {}
    for sample in webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False, empty_check=False):
        for extension, value in sample.items():
            if not extension.startswith("__"):
                found[value.decode()] = (sample["__key__"], extension)
    ours = {name: (split[0], split[1].lower()) for name in NAMES if (split := split_member(name))}
    assert ours == found
    used = {name for name, (_, extension) in ours.items() if is_used(extension)}
    assert used == {"a.jpg", "a.json", "dir.x/b.json", "e.png", "e.0.png", "e.JSON", "k.txt", "k.webp", "__x.json"}


def others(folder, shards=3):
    """Shards with classes, arrays, masks and dotted keys between what we use."""
    folder.mkdir()
    for shard in range(shards):
        members = []
        for n in range(4):
            key, number = f"s{shard}{n}", 4 * shard + n
            members += [(f"{key}.cls", b"3"), (f"{key}.jpg", plain_image(number, kind="JPEG")), (f"{key}.npy", b"\x93")]
            members += [(f"{key}.seg.png", plain_image(9)), (f"{key}.json", conversation_json(answer=str(number)))]
        write_tar(folder / f"t-{shard:03d}.tar", [*members, ("LICENSE", b"MIT")])
    return folder


def test_other_members_are_skipped_and_counted(tmp_path, capsys):
    folder = others(tmp_path / "set")
    assert main(["index", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "3 shards, 12 samples, 12 images, 12 turns" in out
    for what, count in ((".cls", 12), (".npy", 12), (".seg.png", 12), ("without a key", 3)):
        assert f"skipped: {count} member(s) {what!r}" in out
    reader = ShardReader(folder)
    for number in range(12):
        raw = reader.read(number)
        assert (raw.images, raw.turns[0].gpt) == ((plain_image(number, kind="JPEG"),), str(number))
    assert main(["check", str(folder)]) == 0


def test_a_caption_whose_image_is_skipped_is_no_sample_without_an_image(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.v1.jpg", plain_image(1, kind="JPEG")), ("a.txt", b"a circle")])
    faults: list[str] = []
    skipped: Counter[str] = Counter()
    index_shard(tmp_path / "0.tar", faults, skipped)
    assert skipped == {".v1.jpg": 1}
    assert "expected an image with the caption, got none" in faults[0]


def test_a_set_of_which_nothing_can_be_used_tells_what_it_holds(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.v1.jpg", b"x"), ("a.v1.json", b"{}")])
    with pytest.raises(UserError, match=r"with none, but members that are skipped: 1 '.v1.jpg', 1 '.v1.json'"):
        build_index(tmp_path, skipped=Counter())


def test_a_pattern_names_some_shards_of_a_folder(tmp_path, spec, capsys):
    folder = others(tmp_path / "set", 4)
    assert main(["index", str(folder)]) == 0
    pattern = f"{folder}/t-{{001..002}}.tar"
    names = list(webdataset.shardlists.expand_urls(pattern))
    assert [f"{folder}/{shard.name}" for shard in load_index(pattern)] == names
    reader = pickle.loads(pickle.dumps(ShardReader(pattern)))  # as a worker gets it
    assert [reader.read(n).turns[0].gpt for n in range(len(reader))] == [str(n) for n in range(4, 12)]
    assert main(["check", pattern]) == 0
    module = ImageTextShards(train=f"{folder}/t-003.tar", spec=spec, batch_size=4)
    module.setup("fit")
    assert sorted(next(iter(module.train_dataloader()))["keys"]) == ["s30", "s31", "s32", "s33"]
    (folder / "t-000.tar").unlink()  # not asked for, so not missed
    assert len(ShardReader(pattern)) == 8
    capsys.readouterr()
    assert main(["index", pattern]) == 0
    assert "2 shards, 8 samples" in capsys.readouterr().out
    assert len(json.loads((folder / "index.json").read_text())["shards"]) == 2


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("set/t-{000..009}.tar", "expected 10 shards, the index of set lacks t-003.tar, t-004.tar, t-005.tar"),
        ("{a,b}/x.tar", "got 2 folders. Name each folder"),
        ("set/{000..9999999}.tar", "more than 1000000"),
        ("set/{000..009.tar", "braces in pairs"),
    ],
)
def test_a_pattern_that_cannot_be_is_told(tmp_path, monkeypatch, pattern, sentence):
    monkeypatch.chdir(tmp_path)
    build_index(others(tmp_path / "set"))
    with pytest.raises(UserError, match=sentence):
        load_index(pattern)
