"""Checkpoints: written whole or not at all, the last two kept, damaged ones passed over."""

from __future__ import annotations

import errno
import logging
import os
import resource
import sys
from pathlib import Path

import pytest
import torch

from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import remove_leftovers, write_atomically, write_fault
from moextend_pl.runs.checkpoint import (
    PENDING_CHECKPOINT,
    AtomicCheckpointIO,
    drop_later,
    newest_valid,
    take_place,
)


@pytest.mark.parametrize("old", [None, "old"], ids=["no file before", "a file before"])
def test_writer_that_fails_half_way_leaves_what_was_there(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)

    def write(target: Path) -> None:
        target.write_text("half of the n")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, write)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if old is None else [old])


def test_written_file_takes_the_place_of_the_old_one_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, lambda target: target.write_text("one"))
    write_atomically(path, lambda target: target.write_text("two"))
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_checkpoint_file_is_written_beside_its_place(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"weight": torch.ones(2)}, path)
    with pytest.raises(Exception, match="pickle"):
        plugin.save_checkpoint({"weight": lambda: None}, path)
    assert torch.load(path, weights_only=True)["weight"].tolist() == [1, 1]
    assert list(tmp_path.iterdir()) == [path]


def flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


SPOILT = {
    "a flipped bit": flip_a_bit,
    "half of it": lambda data: data[: len(data) // 2],
    "nothing": lambda _: b"",
    "something else": lambda _: b"hello, world",
}


@pytest.mark.parametrize("damage", SPOILT)
def test_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    path, plugin = tmp_path / "last.ckpt", AtomicCheckpointIO()
    plugin.save_checkpoint({"state_dict": {"weight": torch.ones(1000)}}, path)
    assert plugin.load_checkpoint(path, weights_only=True)["state_dict"]["weight"].tolist() == [1] * 1000
    path.write_bytes(SPOILT[damage](path.read_bytes()))
    with pytest.raises(UserError, match=r"last\.ckpt', got a damaged or another file .*--fresh") as caught:
        plugin.load_checkpoint(path, weights_only=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_row_7_a_checkpoint_put_together_from_two_is_refused(tmp_path: Path, share: float) -> None:
    plugin, whole = AtomicCheckpointIO(), []
    for name, value in (("old.ckpt", 1.0), ("new.ckpt", 2.0)):
        weights = {f"weight{n}": torch.full((1000,), value) for n in range(4)}
        plugin.save_checkpoint({"state_dict": weights}, tmp_path / name)
        whole.append((tmp_path / name).read_bytes())
    old, new = whole
    assert len(old) == len(new)
    place = int(share * len(old))
    (tmp_path / "new.ckpt").write_bytes(new[:place] + old[place:])
    with pytest.raises(UserError, match="damaged or another file"):
        plugin.load_checkpoint(tmp_path / "new.ckpt")


def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="without `state_dict`"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "weights.pt", weights_only=True)
    with pytest.raises(UserError, match="another file .IsADirectoryError"):
        AtomicCheckpointIO().load_checkpoint(tmp_path, weights_only=True)


def checkpoint(path: Path, step: int) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.ones(1000)}, "global_step": step}, path)


def step_of(path: Path | None) -> int:
    return -1 if path is None else torch.load(path, weights_only=True)["global_step"]


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) is None
    for step in (1, 2, 3):
        checkpoint(tmp_path / PENDING_CHECKPOINT, step)
        take_place(tmp_path / PENDING_CHECKPOINT)
        assert newest_valid(tmp_path) == tmp_path / "last.ckpt"
    assert {path.name: step_of(path) for path in tmp_path.iterdir()} == {"last.ckpt": 3, "previous.ckpt": 2}


def test_row_26_times_of_files_do_not_say_which_checkpoint_is_the_last(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint(tmp_path / PENDING_CHECKPOINT, step)
        take_place(tmp_path / PENDING_CHECKPOINT)
    os.utime(tmp_path / "last.ckpt", (0, 0))
    assert step_of(newest_valid(tmp_path)) == 2


@pytest.mark.parametrize("damage", [*SPOILT, "gone"])
def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    checkpoint(last, 2)
    checkpoint(previous, 1)
    if damage == "gone":  # as where a run is killed between two renames
        last.unlink()
    else:
        last.write_bytes(SPOILT[damage](last.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="moextend_pl"):
        chosen = newest_valid(tmp_path)
    assert chosen == previous
    assert ("damaged: " in caplog.text and str(last) in caplog.text) == (damage != "gone")
    # The next checkpoint takes the place of the damaged one, never that of the good one.
    drop_later(tmp_path, str(chosen))
    checkpoint(tmp_path / PENDING_CHECKPOINT, 2)
    take_place(tmp_path / PENDING_CHECKPOINT)
    assert (step_of(last), step_of(previous)) == (2, 1)


def dies_before(number: int, folder: Path) -> bool:
    """Saves step 3 in a process that is killed before one of its operations on files; returns whether there was one."""
    child = os.fork()
    if not child:
        left = number

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.remove", "os.chmod") and str(folder) in str(arguments):
                left -= 1
                if left < 0:
                    os._exit(1)

        try:
            sys.addaudithook(count)
            checkpoint(folder / PENDING_CHECKPOINT, 3)
            take_place(folder / PENDING_CHECKPOINT)
            os._exit(0)
        finally:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1)
    return code == 1


def test_row_3_a_run_killed_at_any_operation_on_its_files_goes_on_from_the_last_checkpoint_or_the_new_one(
    tmp_path: Path,
) -> None:
    found: list[int] = []
    for number in range(50):
        folder = tmp_path / f"run{number}" / "checkpoints"
        checkpoint(folder / "last.ckpt", 2)
        checkpoint(folder / "previous.ckpt", 1)
        killed = dies_before(number, folder)
        remove_leftovers(folder.parent)
        chosen = newest_valid(folder)
        found.append(step_of(chosen))
        drop_later(folder, str(chosen))
        checkpoint(folder / PENDING_CHECKPOINT, 4)
        take_place(folder / PENDING_CHECKPOINT)
        assert {path.name: step_of(path) for path in folder.iterdir()} == {
            "last.ckpt": 4,
            "previous.ckpt": found[-1],
        }
        if not killed:
            break
    # Before the two renames at the end, between them (the new one is not counted yet, whole as it is), and after them.
    assert len(found) > 6
    assert found == [2] * (len(found) - 2) + [3, 3]


def test_a_run_all_of_whose_checkpoints_are_damaged_names_them(tmp_path: Path) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(UserError, match=r"only damaged ones: .*last\.ckpt.*previous\.ckpt.*--ckpt_path.*--fresh"):
        newest_valid(tmp_path)


def test_going_back_to_the_checkpoint_before_keeps_it(tmp_path: Path) -> None:
    checkpoint(tmp_path / "last.ckpt", 2)
    checkpoint(tmp_path / "previous.ckpt", 1)
    for other in (None, str(tmp_path / "last.ckpt"), "elsewhere/previous.ckpt"):
        drop_later(tmp_path, other)
        assert step_of(tmp_path / "last.ckpt") == 2
    drop_later(tmp_path, str(tmp_path / "previous.ckpt"))
    assert not (tmp_path / "last.ckpt").exists()


def test_full_disk_is_called_so_whatever_the_writer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("unexpected pos 64 vs 0")  # what torch says

    with pytest.raises(RuntimeError, match="unexpected pos"):
        write_atomically(tmp_path / "file", write)
    for number in (errno.ENOSPC, errno.EDQUOT):

        def refuse(_: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            write_atomically(tmp_path / "file", write)
        assert caught.value.filename == str(tmp_path / "file")
        assert write_fault(caught.value) is caught.value
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_the_size_of_files_is_called_so(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            AtomicCheckpointIO().save_checkpoint({"a": torch.ones(100_000)}, tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
