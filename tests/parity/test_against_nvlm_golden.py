"""Grids of tiles against the rules of Megatron-LM, whose code made the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from moextend_pl.samples.tiling.tiles import Tiling, grids

FIXTURES = Path(os.environ.get("MOEXTEND_FIXTURES", Path(__file__).parents[1] / "fixtures"))


def test_every_size_has_the_published_grid_and_number_of_tiles_by_both_rules() -> None:
    golden = json.loads((FIXTURES / "nvlm_tiles.json").read_text())
    assert golden["sizes"]
    for case in golden["sizes"]:
        picture, most = (case["width"], case["height"], golden["tile"]), case["max_tiles"]
        assert Tiling.parse(most).grid(*picture) == (case["columns"], case["rows"])
        assert Tiling.parse(most).count(*picture) == case["tiles_with_thumbnail"]
        assert Tiling.parse(f"{most}:area").grid(*picture) == tuple(case["area_weighted"])


def test_there_are_as_many_grids_as_published() -> None:
    assert (len(grids(6)), len(grids(12))) == (14, 35)
