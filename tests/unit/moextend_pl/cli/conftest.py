"""A stage of seconds, and its module on the path."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent

STAGE = """\
trainer:
  default_root_dir: {run}
  max_steps: 3
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{filename: last, every_n_train_steps: 1, enable_version_counter: false}}
model:
  class_path: toy_stage.Toy
  init_args:
    n_experts: 2
data:
  class_path: toy_stage.ToyData
"""


@pytest.fixture(autouse=True)
def _toy_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    path = tmp_path / "stage.yaml"
    path.write_text(STAGE.format(run=tmp_path / "run"))
    return path
