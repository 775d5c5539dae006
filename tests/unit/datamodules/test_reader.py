from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import pytest

from datamodules import reader as reader_module
from datamodules.reader import ShardReader
from moextend_pl.contracts import UserError


def test_every_sample_is_read_as_it_was_written_in_any_order(folder, entry):
    reader = ShardReader(folder)
    assert len(reader) == 11
    for number in [10, 0, 7, 3, 4, 9, 1, 8, 2, 6, 5]:
        raw, expected = reader.read(number), entry(number)
        assert raw.key == expected.key
        assert raw.images == expected.images
        values = [text for turn in raw.turns for text in (turn.human, turn.gpt)]
        assert values == [turn["value"] for turn in expected.conversations]


def test_images_come_in_the_order_of_their_numbers_not_of_their_names(tmp_path, picture):
    from datamodules.shards import Entry, conversation, write_shards

    images = tuple(picture(i) for i in range(12))
    write_shards([Entry("a", conversation(("<image>" * 12 + "?", "yes")), images)], tmp_path)
    assert ShardReader(tmp_path).read(0).images == images


def test_a_key_that_no_shard_can_hold_is_not_found(folder):
    assert ShardReader(folder).find("s0\ud83d") is None
    assert ShardReader(folder).find("s05") == 5


def test_a_number_outside_is_an_error(folder):
    for number in (-1, 11):
        with pytest.raises(IndexError):
            ShardReader(folder).read(number)


def test_a_shard_changed_after_indexing_is_named_with_both_sizes(folder):
    size = (folder / "00001.tar").stat().st_size
    open_reader = ShardReader(folder)
    with (folder / "00001.tar").open("ab") as stream:
        stream.write(b"x")
    for read in (lambda: ShardReader(folder), lambda: open_reader.read(5)):
        with pytest.raises(UserError, match=f"00001.tar.*{size} bytes.*{size + 1}"):
            read()


def test_a_missing_shard_is_named(folder):
    (folder / "00002.tar").unlink()
    with pytest.raises(UserError, match=r"00002.tar"):
        ShardReader(folder)


READS = 3000
"""Enough that readers which shared a file position would trip over each other."""


def open_handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_few_handles_stay_open(folder, monkeypatch):
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 2)
    reader = ShardReader(folder)
    before = open_handles()  # the index keeps one
    for number in [0, 4, 8, 0, 4, 8]:
        reader.read(number)
    assert open_handles() == before + 2
    reader.close()
    assert open_handles() == before


def test_a_pickled_reader_opens_its_own_handles(folder):
    reader = ShardReader(folder)
    reader.read(0)
    twin = pickle.loads(pickle.dumps(reader))
    reader.close()
    assert twin.read(0).key == "s00"


def test_forked_children_do_not_disturb_each_other(folder):
    reader = ShardReader(folder)
    reader.read(0)  # the handle is open before the fork
    children = []
    for first in range(3):
        child = os.fork()
        if child == 0:
            good = all(reader.read((first + i) % 4).key == f"s{(first + i) % 4:02d}" for i in range(READS))
            os._exit(0 if good else 1)
        children.append(child)
    assert all(reader.read(i % 4).key == f"s{i % 4:02d}" for i in range(READS))
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]


def test_threads_do_not_disturb_each_other(folder):
    reader = ShardReader(folder)
    wrong: list[int] = []

    def read() -> None:
        wrong.extend(i for i in range(READS) if reader.read(i % 4).key != f"s{i % 4:02d}")

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_member_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(reader_module, "MAX_SAMPLE_BYTES", 10)
    with pytest.raises(UserError, match="s00"):
        ShardReader(folder).read(0)
