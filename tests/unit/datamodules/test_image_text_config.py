from __future__ import annotations

import lightning.pytorch as pl
from jsonargparse import ArgumentParser

from datamodules import ImageTextShards
from datamodules.mixture import ShardSet


def test_it_is_built_from_a_configuration(folder):
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    arguments = {"train": [str(folder)], "test": {"x": str(folder)}, "rows": {"turns": "single"}, "batch_size": 2}
    config = parser.parse_object({"data": {"class_path": "datamodules.ImageTextShards", "init_args": arguments}})
    assert "spec" not in config.as_dict()["data"]["init_args"] or config.data.init_args.spec is None
    found = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config).data
    assert isinstance(found, ImageTextShards)
    assert (found.train, found.test_names, found.batch_size) == ([str(folder)], ["x"], 2)


def test_a_mixture_is_built_from_a_configuration(folder):
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    mixed = [{"path": "a", "weight": 0.8, "task": "vqa"}, {"path": "b", "weight": 0.2}]
    arguments = {"train": mixed, "val": ["c"], "test": {"x": {"path": "d", "task": "vqa"}, "y": "e"}}
    config = parser.parse_object({"data": {"class_path": "datamodules.ImageTextShards", "init_args": arguments}})
    found = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config).data
    assert found.train == [ShardSet("a", 0.8, "vqa"), ShardSet("b", 0.2)]
    assert (found.val, found.test) == (["c"], {"x": ShardSet("d", None, "vqa"), "y": "e"})
