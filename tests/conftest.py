"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tiny models lose time when several threads share an operation, above all where processes share cores: threads that
# wait for the next operation spin. It is read when torch is imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from helpers.tiny_world import TinyWorld, build_tiny_world

torch.set_num_threads(1)


@pytest.fixture
def fixtures() -> Path:
    """Folder of the golden files; `MOEXTEND_FIXTURES` names another of the same layout."""
    return Path(os.environ.get("MOEXTEND_FIXTURES", Path(__file__).parent / "fixtures"))


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A language model, a vision tower and shards, read-only."""
    return build_tiny_world(tmp_path_factory.mktemp("tiny_world"))


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """Folder of a finished `make quickstart`; `MOEXTEND_RUN` names another one."""
    root = Path(__file__).parents[1]
    run = root / os.environ.get("MOEXTEND_RUN", "runs/quickstart")
    if not (run / "report.json").is_file():
        pytest.skip(f"needs the results of `make quickstart` in {run}; MOEXTEND_RUN names another folder")
    return run
