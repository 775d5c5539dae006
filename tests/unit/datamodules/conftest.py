"""Fixtures of the tests of shards."""

from __future__ import annotations

import pytest
from helpers.faulty_shards import write_tar

from datamodules.scan import build_index


@pytest.fixture
def tar_folder(tmp_path):
    """Makes a folder with one shard of given members and its index."""

    def make(members, **options):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        write_tar(folder / "0.tar", members, **options)
        build_index(folder, faults=[])
        return folder

    return make
