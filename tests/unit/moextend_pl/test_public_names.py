"""The handful of names that notebooks and stage files use."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_world import TinyWorld, make_plan
from torch import equal

import moextend_pl
from moextend_pl.models.delta import save_delta


@pytest.mark.parametrize("name", moextend_pl.__all__)
def test_name_is_what_it_says(name: str) -> None:
    assert getattr(moextend_pl, name).__name__ == name


def test_type_checkers_and_python_see_the_same_names() -> None:
    tree = ast.parse(Path(moextend_pl.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed - {"Path"} | {"load"} == set(moextend_pl.__all__)


def test_torch_is_imported_when_a_name_needs_it_and_not_before() -> None:
    code = (
        "import sys, moextend_pl\n"
        "moextend_pl.ExtensionPlan, moextend_pl.UserError, moextend_pl.load\n"
        "early = 'torch' in sys.modules\n"
        "moextend_pl.Projector\n"
        "sys.exit(early or 'torch' not in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'MoExtnd'"):
        _ = moextend_pl.MoExtnd


def test_loaded_run_is_the_model_that_was_saved(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = tiny_world.model(make_plan(), parts=["new_experts", "new_routers", "calibration", "projector"])
    save_delta(model, tmp_path)
    again, batch = moextend_pl.load(tmp_path), tiny_world.batch(model, "it")
    assert equal(again.language(batch, again.embed(batch)), model.language(batch, model.embed(batch)))
