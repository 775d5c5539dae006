"""Mistakes on the command line of shards: one sentence each, never a traceback."""

from __future__ import annotations

import errno
import json

import pytest

from datamodules import command
from datamodules.command import main
from datamodules.shards import conversation
from moextend_pl.contracts import UserError


def build(tmp_path, out):
    items = [{"id": "a", "conversations": conversation(("what ?", "red"))}]
    (tmp_path / "data.json").write_text(json.dumps(items))
    where = ["--json", str(tmp_path / "data.json"), "--images", str(tmp_path), "--workers", "1"]
    return main(["build", "llava", *where, "--out", str(out)])


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data.json"):
        build(tmp_path, tmp_path / "data.json" / "x")
    with pytest.raises(UserError, match="/proc/nothing"):
        build(tmp_path, "/proc/nothing/out")


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "00000.tar")

    monkeypatch.setattr(command, "build_shards", full)
    with pytest.raises(UserError, match=r"00000.tar, got: No space left"):
        build(tmp_path, tmp_path / "out")


def test_a_folder_without_a_tokenizer_is_named(folder):
    with pytest.raises(UserError, match="tokenizer that transformers can load at .*set"):
        main(["check", str(folder), "--tokenizer", str(folder)])
    with pytest.raises(UserError, match="tokenizer that transformers can load at .*set"):
        main(["show", str(folder), "s00", "--tokenizer", str(folder)])


def test_a_check_by_no_process_is_refused(folder):
    with pytest.raises(UserError, match="`workers` of at least 1, got 0"):
        main(["check", str(folder), "--workers", "0"])
