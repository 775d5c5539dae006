from __future__ import annotations

import io
import json
import tarfile

import pytest
import webdataset

from datamodules.index import load_index
from datamodules.shards import Entry, conversation, replace_folder, write_shards
from moextend_pl.contracts import UserError

TURNS = conversation(("<image>\nwhat?", "this"))


def test_plain_webdataset_reads_the_same_samples(folder, entry):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == [f"s{i:02d}" for i in range(11)]
    for number, sample in enumerate(found):
        expected = entry(number)
        assert json.loads(sample["json"]) == {"conversations": expected.conversations}
        names = ["png"] if len(expected.images) == 1 else [f"{i}.png" for i in range(len(expected.images))]
        assert [sample[name] for name in names] == list(expected.images)
        assert {name for name in sample if not name.startswith("_")} == {"json", *names}


def test_offsets_of_the_index_are_those_that_tarfile_finds(folder):
    for shard in load_index(folder):
        with tarfile.open(folder / shard.name) as tar:
            truth = {info.name: (info.offset_data, info.size) for info in tar}
        found = {
            f"{key}.{member.extension}": (member.offset, member.size)
            for position, key in enumerate(shard.keys)
            for member in shard.sample(position)
        }
        assert found == truth


def test_the_same_samples_give_the_same_bytes_without_a_trace_of_user_or_time(tmp_path, entry):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards((entry(i) for i in range(5)), tmp_path / name, 2)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["00000.tar", "00001.tar", "00002.tar", "index.json", "index.safetensors"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    with tarfile.open(tmp_path / "a" / "00000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in tar} == {(0, 0, 0, "", "")}


@pytest.mark.parametrize("key", ["/abs", "../up", "a/../b", "a.b", "", "x" * 95, "a//b"])
def test_keys_that_cannot_be_names_are_refused(tmp_path, key):
    with pytest.raises(UserError):
        write_shards([Entry(key, conversation(("q", "a")))], tmp_path)


def test_a_failure_leaves_the_old_folder_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")

    def fail() -> None:
        with replace_folder(tmp_path / "out", lambda _: True) as partial:
            (partial / "new").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/old").read_text() == "old"


def test_an_image_of_a_kind_that_readers_refuse_is_not_written(tmp_path):
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "GIF")
    with pytest.raises(UserError, match="PNG, JPEG, WEBP"):
        write_shards([Entry("a", TURNS, (stream.getvalue(),))], tmp_path)
