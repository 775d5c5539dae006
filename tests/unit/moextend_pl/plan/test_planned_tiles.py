"""A picture that is cut into tiles is planned as the pictures that it becomes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.tiles import tiled
from helpers.tiny_world import TinyWorld

from moextend_pl.contracts import TrainPlan, UserError
from moextend_pl.plan.command import LOOKED_AT, TILED, uncounted
from moextend_pl.plan.cost import activation_bytes
from moextend_pl.plan.run_shape import Wishes, run_shape
from moextend_pl.plan.shapes import read_shape


def test_pictures_that_are_cut_are_planned_with_their_most_tiles(tiny_world: TinyWorld) -> None:
    config = {"trainer": {"max_steps": 1}, "data": {"init_args": {"batch_size": 2, "rows": {"max_length": 60}}}}
    kept = []
    for tiles, images in ((1, 1), ("6:untagged", 7)):
        module = tiled(tiny_world, str(tiny_world.base), tiles if tiles != 1 else "1:untagged")
        module.train_plan = TrainPlan(("projector",))
        module.configure_model()
        shape = read_shape(module, 4)
        run = run_shape(config, Wishes(), shape)
        assert run.images == shape.tiles == images
        assert TILED.format(images) in uncounted(SimpleNamespace(config=config, module=module))
        kept.append(activation_bytes(shape, run))
    assert kept[1] > kept[0]
    looking = tiled(tiny_world, str(tiny_world.base), 1, looks=1)
    looking.configure_model()
    assert LOOKED_AT in uncounted(SimpleNamespace(config=config, module=looking))
    assert read_shape(looking, 4).placeholders(1) == 0
    reading = tiled(tiny_world, str(tiny_world.base), 6, looks=1, thumbnail=True)
    reading.configure_model()
    assert read_shape(reading, 4).placeholders(7) == shape.tokens_per_image
    with pytest.raises(UserError, match=r"longer than the 28 tokens of an image, got 28"):
        run_shape(config, Wishes(length=28), shape)
