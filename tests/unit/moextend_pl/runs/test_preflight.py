"""What is settled before a model is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from moextend_pl.runs.preflight import set_aside


@pytest.mark.parametrize("reads", [False, True])
def test_a_plan_that_the_new_run_reads_is_not_set_aside(tmp_path: Path, reads: bool) -> None:
    for name in ("extension_plan.yaml", "stage.json"):
        (tmp_path / name).write_text("")
    plan = tmp_path / "extension_plan.yaml" if reads else tmp_path / "another.yaml"
    grows = {"class_path": "callbacks.ExpertExtension", "init_args": {"plan": str(plan)}}
    set_aside(tmp_path, {"trainer": {"callbacks": [grows]}}, fresh=True)
    assert (tmp_path / "extension_plan.yaml").exists() == reads
    assert (tmp_path / "old1" / "stage.json").exists()
