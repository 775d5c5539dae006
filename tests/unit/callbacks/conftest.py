"""Trainers of the tiny world inside this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a trainer whose run directory is `tmp_path/run`."""

    def make(*callbacks: Callback, steps: int = 4, **options: Any) -> Trainer:
        settings: dict[str, Any] = {
            "default_root_dir": tmp_path / "run", "max_steps": steps, "max_epochs": -1, "accelerator": "cpu",
            "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None, "val_check_interval": steps, "limit_val_batches": 1,
        }  # fmt: skip
        return Trainer(callbacks=list(callbacks), **{**settings, **options})

    return make
