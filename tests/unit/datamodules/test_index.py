from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from datamodules.index import ARRAYS_FILE, INDEX_FILE, file_sha256, load_index
from datamodules.reader import ShardReader
from datamodules.scan import build_index, index_shard
from moextend_pl.contracts import UserError

TEXT = json.dumps({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}).encode()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_an_index_survives_being_written_and_read(folder):
    before = build_index(folder)
    after = load_index(folder)
    assert not any(one.differs(other) for one, other in zip(before, after, strict=True))
    assert [len(shard) for shard in after] == [4, 4, 3]
    assert sum(int(shard.turns.sum()) for shard in after) == sum(1 + i % 2 for i in range(11))


def test_shards_of_other_writers_are_indexed(tmp_path):
    write_tar(tmp_path / "x.tar", [("a/b.png", b"1"), ("a/b.json", TEXT), ("c.json", TEXT), ("c.10.jpg", b"22")])
    (shard,) = build_index(tmp_path)
    assert list(shard.keys) == ["a/b", "c"]
    assert [(m.extension, m.size) for m in shard.sample(1)] == [("json", len(TEXT)), ("10.jpg", 2)]


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("/a.json", TEXT)], "Absolute"),
        ([("x/../../a.json", TEXT)], "refused"),
        ([("a.json", TEXT), ("b.json", TEXT), ("a.json", TEXT)], "stands twice"),
        ([("a.json", TEXT), ("a.json", TEXT)], "stands twice"),
        ([("a.png", b"x")], "no KEY.json and no KEY.txt"),
        ([("a.json", b"\xff{}")], "UTF-8"),
        ([("a.json", b"[" * 100_000)], "JSON"),
        ([("a.json", b"[1]")], "conversations"),
    ],
)
def test_members_that_are_no_samples_are_refused(tmp_path, members, sentence):
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=sentence):
        index_shard(tmp_path / "x.tar")


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="no regular file"):
        index_shard(tmp_path / "x.tar")


def test_the_same_key_in_two_shards_is_refused(tmp_path):
    for name in ("x.tar", "y.tar"):
        write_tar(tmp_path / name, [("a.json", TEXT)])
    with pytest.raises(UserError, match=r"'a' stands in x.tar and y.tar"):
        build_index(tmp_path)


def test_every_cut_and_every_broken_header_is_noticed(folder):
    path = folder / "00000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = [(info.offset, info.offset_data, info.size) for info in tar]
    end = members[-1][1] + -(-members[-1][2] // 512) * 512
    cuts = {end, end + 512}
    for header, data, size in members:
        cuts |= {header, header + 100, data, data + size // 2}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"00000.tar"):
            index_shard(path)
    for header, _, _ in members:
        broken = bytearray(whole)
        broken[header + 150] ^= 1  # inside the header's checksum
        path.write_bytes(bytes(broken))
        with pytest.raises(UserError, match=r"00000.tar"):
            index_shard(path)


def test_a_compressed_tar_is_refused(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.json", TEXT)], "w:gz")
    with pytest.raises(UserError, match="plain tar"):
        index_shard(tmp_path / "x.tar")


def test_a_missing_folder_or_index_names_the_place_and_the_next_command(tmp_path):
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=r"cwd .*shards build") as caught:
            load_index(place)
        assert str(place) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not a readable index"),
        ("[]", "not a readable index"),
        ('{"schema": 99}', "schema: 2.*got 99.*shards index"),
        ('{"schema": 1, "shards": []}', "schema: 2.*got 1.*shards index"),
        ('{"schema": 2}', "not a readable index"),
        ('{"schema": 2, "arrays": {"bytes": 1, "sha256": "../x"}, "shards": []}', "not a readable index.*64 digits"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, content, sentence):
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(UserError, match=sentence):
        load_index(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "../x.tar"}, "refused"),
        ({"sha256": "x"}, "64 digits"),
        ({"samples": 5}, "unknown extension|more samples|fewer samples"),
        ({"samples": -1}, "more samples"),
        ({"samples": 10**9}, "more samples"),
        ({"samples": 2}, "fewer samples"),
        ({"extensions": []}, "unknown extension"),
        ({"bytes": "many"}, "not a readable index"),
    ],
)
def test_facts_of_a_shard_that_cannot_be_are_refused(folder, change, sentence):
    index = json.loads((folder / INDEX_FILE).read_text())
    index["shards"][0 if "name" in change else -1].update(change)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UserError, match=sentence):
        load_index(folder)


def test_arrays_that_are_not_those_of_the_index_are_refused(folder, tmp_path):
    path = folder / ARRAYS_FILE
    whole = path.read_bytes()
    for data, sentence in ((whole[:-1], "the file has"), (whole[:-1] + b"x", "shards index"), (b"", "the file has")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=sentence):
            load_index(folder)
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        load_index(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"turns": np.zeros(11, np.int32)},
        {"turns": np.ones(10, np.int32)},
        {"turns": np.ones(11, np.float32)},
        {"starts": np.zeros(12, np.int64)},
        {"starts": np.arange(12)[::-1].copy()},
        {"key_ends": np.arange(12) * 100},
        {"members": -np.ones((21, 3), np.int64)},
        {"members": np.full((21, 3), 9)},
        {"members": np.zeros((21, 2), np.int64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arrays_that_do_not_fit_together_are_refused(folder, change):
    index = json.loads((folder / INDEX_FILE).read_text())
    path = folder / ARRAYS_FILE
    save_file({**load_file(path), **change}, path)
    index["arrays"] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}  # whoever wrote it meant it
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a readable index"):
        load_index(folder)


def test_a_key_is_found_again_whatever_its_bytes(tmp_path):
    names = ["a", "b/c", "\u00fc-\u6f22", "d"]
    write_tar(tmp_path / "x.tar", [(f"{name}.json", TEXT) for name in names])
    build_index(tmp_path)
    (shard,) = load_index(tmp_path)
    assert [shard.keys[i] for i in range(4)] == list(shard.keys) == shard.keys[:] == names
    assert shard.keys[-1] == "d"
    assert [ShardReader(tmp_path).find(name) for name in [*names, "c", "a-", "zz"]] == [0, 1, 2, 3, None, None, None]


def test_a_folder_without_samples_is_refused(tmp_path):
    with pytest.raises(UserError, match="Expected samples"):
        build_index(tmp_path)


def test_an_index_opens_without_torch_which_would_take_seconds(folder):
    program = (
        "import sys; from datamodules.reader import ShardReader\n"
        f"print(ShardReader({str(folder)!r}).read(5).key, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "s05 False\n"


def test_the_arrays_are_a_file_that_safetensors_reads(folder):
    found = load_file(folder / ARRAYS_FILE)
    assert {name: (array.dtype, array.shape) for name, array in found.items()} == {
        "turns": (np.int32, (11,)),
        "starts": (np.int64, (12,)),
        "members": (np.int64, (21, 3)),
        "keys": (np.uint8, (33,)),
        "key_ends": (np.int64, (12,)),
        "checksums": (np.uint32, (11,)),
    }


def test_an_index_written_anew_does_not_disturb_who_has_the_old_one_open(folder, entry):
    reader = ShardReader(folder)
    build_index(folder)
    assert [reader.read(n).key for n in range(11)] == [entry(n).key for n in range(11)]
    assert (folder / ARRAYS_FILE).stat().st_mode & 0o044 == (folder / INDEX_FILE).stat().st_mode & 0o044
