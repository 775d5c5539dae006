"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moextend_pl.runs.atomic import remove_leftovers, write_atomically, write_folder
from moextend_pl.runs.checkpoint import AtomicCheckpointIO


def modes(folder: Path) -> set[str]:
    return {oct(path.stat().st_mode & 0o777) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_says_who_may_read_what_is_written(tmp_path: Path, umask: int) -> None:
    tensors = {"a": torch.ones(2)}
    write_atomically(tmp_path / "a.safetensors", lambda path: save_file(tensors, path))
    AtomicCheckpointIO().save_checkpoint({"state_dict": tensors}, tmp_path / "a.ckpt")

    def write(folder: Path) -> None:
        (folder / "deep").mkdir()
        save_file(tensors, folder / "deep" / "a.safetensors")

    write_folder(tmp_path / "folder", write)
    assert modes(tmp_path) == {oct(0o666 & ~umask)}
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_a_folder_that_is_written_half_way_leaves_the_older_one(tmp_path: Path) -> None:
    def write(folder: Path, text: str = "old") -> None:
        (folder / "a").write_text(text)
        if text == "half":
            raise ValueError(text)

    path = tmp_path / "run" / "base"
    with pytest.raises(ValueError, match="half"):
        write_folder(path, lambda folder: write(folder, "half"))
    assert not path.exists()
    write_folder(path, write)
    with pytest.raises(ValueError, match="half"):
        write_folder(path, lambda folder: write(folder, "half"))
    assert (path / "a").read_text() == "old"
    write_folder(path, lambda folder: write(folder, "new"))
    assert (path / "a").read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["base"]
    assert [p.name for p in path.iterdir()] == ["a"]


def test_what_a_killed_run_left_is_deleted_folders_too(tmp_path: Path) -> None:
    (tmp_path / "deep" / ".base.7.tmp" / "x").mkdir(parents=True)
    (tmp_path / "deep" / ".base.7.tmp" / ".y.tmp").write_text("")
    (tmp_path / ".file.7.tmp").write_text("")
    (tmp_path / "kept.tmp").write_text("")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "kept.tmp"]
