"""A pipeline of the user's own as the training set: real ones of webdataset, and plain iterables."""

from __future__ import annotations

import io
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
import yaml
from helpers.ranks import run_rounds
from helpers.stages import write_stage
from helpers.tiny_world import SAMPLES, TinyWorld
from lightning.pytorch import Callback, Trainer
from PIL import Image

from callbacks.train_only import TrainOnly
from datamodules import ImageTextShards, OwnPipeline
from datamodules.options import ReadingSpec, RowSpec
from moextend_pl import cli
from moextend_pl.contracts import Batch, UserError
from moextend_pl.runs.atomic import read_json

BATCH = 4


def shards(world: TinyWorld, decode: str = "", **options: Any) -> webdataset.WebDataset:
    urls = sorted(str(path) for path in Path(world.data("mixed")).glob("*.tar"))
    whole = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=3, **options).shuffle(10)
    return whole.decode(decode) if decode else whole


def batches(world: TinyWorld, pipeline: Callable[[], Any], count: int, workers: int = 0, **reading: int) -> list[Batch]:
    data = OwnPipeline(
        pipeline, batch_size=BATCH, spec=world.unbuilt().sample_spec(), reading=ReadingSpec(workers, **reading)
    )
    data.setup("fit")
    return list(itertools.islice(data.train_dataloader(), count))


def by_key(found: list[Batch]) -> dict[str, tuple[list[int], list[int]]]:
    """Returns ids and labels of each sample, without padding."""
    rows = {}
    for batch in found:
        for row, key in enumerate(batch["keys"]):
            real = batch["attention_mask"][row].bool()
            rows[key] = (batch["input_ids"][row][real].tolist(), batch["labels"][row][real].tolist())
    return rows


@pytest.fixture(scope="module")
def of_shards(tiny_world: TinyWorld) -> dict[str, Any]:
    """The same samples as the project's own reader has them."""
    spec = tiny_world.unbuilt().sample_spec()
    data = ImageTextShards(tiny_world.data("mixed"), batch_size=BATCH, spec=spec)
    data.setup("fit")
    return by_key(list(itertools.islice(data.train_dataloader(), SAMPLES // BATCH)))


@pytest.mark.parametrize(("decode", "workers"), [("", 0), ("pil", 2)])
def test_a_pipeline_of_webdataset_gives_the_samples_of_its_shards(
    tiny_world: TinyWorld, of_shards: dict[str, Any], decode: str, workers: int
) -> None:
    # A worker that has fewer shards is through with them sooner and begins again; three rounds are enough for all.
    found = batches(tiny_world, lambda: shards(tiny_world, decode), 3 * SAMPLES // BATCH, workers)
    assert len(of_shards) == SAMPLES
    assert by_key(found) == of_shards
    if not workers:
        first = [key for batch in found[: SAMPLES // BATCH] for key in batch["keys"]]
        assert len(set(first)) == SAMPLES  # once a round
        assert first != sorted(first)


def picture(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


TURNS = [{"from": "human", "value": "<image>\nwhat is the color ?"}, {"from": "gpt", "value": "red"}]


def test_plain_iterables_share_their_samples_between_workers(tiny_world: TinyWorld) -> None:
    samples = [{"__key__": f"k{n}", "image": picture("red"), "conversations": TURNS} for n in range(8)]
    keys = [key for batch in batches(tiny_world, lambda: samples, 2, workers=2) for key in batch["keys"]]
    assert sorted(keys) == [f"k{n}" for n in range(8)]


def test_forms_of_a_sample(tiny_world: TinyWorld) -> None:
    image, text = Image.new("RGB", (8, 8), "red"), json.dumps({"conversations": TURNS})
    forms = [
        {"images": [image], "conversations": TURNS}, {"png": picture("red"), "json": text.encode()},
        {"0.png": image, "json": json.loads(text)}, {"jpg": image, "txt": "red"},
    ]  # fmt: skip
    (batch,) = batches(tiny_world, lambda: forms, 1)
    assert batch["keys"] == ["0-0", "0-1", "0-2", "0-3"]
    first, *others = batch["pixel_values"]
    assert all(torch.equal(first, other) for other in others)
    rows = by_key([batch])
    assert rows["0-0"] == rows["0-1"] == rows["0-2"] != rows["0-3"]


def test_bad_samples_are_left_out_and_counted(tiny_world: TinyWorld) -> None:
    bad = [{"image": "a.png", "conversations": TURNS}, {"image": picture("red")}]
    good = [{"image": picture("red"), "conversations": TURNS}] * 6
    found = batches(tiny_world, lambda: [*bad, *good], 1, max_bad_samples=2)
    assert len(found) == 1
    with pytest.raises(UserError, match="bytes or PIL images, got str"):
        batches(tiny_world, lambda: [*bad, *good], 1, max_bad_samples=0)


def cut_short(path: Path) -> Image.Image:
    """Returns a picture that Pillow has opened and cannot read to its end."""
    path.write_bytes(picture("red")[:-30])
    return Image.open(path)


def test_a_picture_that_was_opened_and_cannot_be_read_is_a_bad_sample(
    tiny_world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = [cut_short(tmp_path / "a.png"), *[picture("red")] * 7]
    samples = [{"image": image, "conversations": TURNS} for image in found]
    (batch,) = batches(tiny_world, lambda: samples, 1)
    assert len(batch["image_keys"]) == BATCH - 1
    assert "the image is cut short or damaged" in caplog.text


def test_decoded_pictures_of_equal_bytes_have_names_of_their_own(tiny_world: TinyWorld) -> None:
    # By its name a picture's features are kept, where the tower is frozen.
    red, blue = (Image.new("P", (8, 8)) for _ in range(2))
    red.putpalette([255, 0, 0] * 256)
    blue.putpalette([0, 0, 255] * 256)
    wide, tall = (Image.frombytes("RGB", size, bytes(range(96))) for size in ((8, 4), (4, 8)))
    images = [red, blue, wide, tall, red.copy()]
    assert (red.tobytes(), wide.tobytes()) == (blue.tobytes(), tall.tobytes())
    found = batches(tiny_world, lambda: [{"image": image, "conversations": TURNS} for image in images * 4], 5)
    pixels = {key: value for batch in found for key, value in zip(batch["image_keys"], batch["pixel_values"])}
    assert len(pixels) == 4
    for batch in found:
        assert all(torch.equal(pixels[key], own) for key, own in zip(batch["image_keys"], batch["pixel_values"]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_generator_that_is_through_is_begun_again(tiny_world: TinyWorld, workers: int) -> None:
    def two_rounds() -> Iterator[dict[str, Any]]:
        yield from itertools.islice(endless(), 2 * BATCH)

    keys = [key for batch in batches(tiny_world, two_rounds, 4, workers) for key in batch["keys"]]
    assert sorted(keys) == sorted(2 * [f"k{n}" for n in range(2 * BATCH)])


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        (list, "yields no sample"),
        (lambda: [("a", "b")], "as mappings .* got tuple"),
        (lambda: [{"__key__": "a", "image": b"none", "conversations": TURNS}], "no sample that can be used"),
    ],
)
def test_pipelines_that_cannot_be_used_are_told(tiny_world: TinyWorld, pipeline: Callable, words: str) -> None:
    with pytest.raises(UserError, match=words):
        batches(tiny_world, pipeline, 1)


@pytest.mark.parametrize("rows", [{"packing": True, "max_length": 64}, {"bucket": 4}, {"turns": "single"}])
def test_what_needs_all_samples_beforehand_is_refused(rows: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="samples are not known beforehand"):
        OwnPipeline(list, rows=RowSpec(**rows))


class Keys(Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        self.seen += batch["keys"]


def endless() -> Iterator[dict[str, Any]]:
    for number in itertools.count():
        yield {"__key__": f"k{number}", "image": picture("red"), "conversations": TURNS}


def test_a_run_that_goes_on_begins_the_pipeline_anew_and_says_so(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(steps: int, **options: Any) -> tuple[list[str], OwnPipeline]:
        keys, data = Keys(), OwnPipeline(endless, tiny_world.data("vqa", "test"), batch_size=BATCH)
        trainer = make_trainer(TrainOnly(["projector"]), keys, steps=steps, enable_checkpointing=True)
        trainer.fit(tiny_world.unbuilt(), data, weights_only=True, **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return keys.seen, data

    with caplog.at_level(logging.WARNING, logger="datamodules"):
        whole, _ = fit(3)
        assert whole == [f"k{n}" for n in range(3 * BATCH)]
        assert "sees others than one that was not" in caplog.text
        assert "begins anew" not in caplog.text
        again, data = fit(5, ckpt_path=tmp_path / "last.ckpt")
    assert again == [f"k{n}" for n in range(2 * BATCH)]
    assert f"of the {3 * BATCH} samples" in caplog.text
    assert (data.consumed, data.epoch) == (5 * BATCH, 0)
    with pytest.raises(UserError, match="written with shards"):
        data.load_state_dict({"schema": 1, "consumed": 4})


def write_own(world: TinyWorld, folder: Path, splitter: str, workers: int) -> list[str]:
    """Returns the command of a stage on `my_pipeline.training`, which is written beside it."""
    urls = sorted(map(str, Path(world.data("mixed")).glob("*.tar")))
    made = f"webdataset.WebDataset({urls}, shardshuffle=False, nodesplitter={splitter})"
    (folder / "my_pipeline.py").write_text(f"import webdataset\n\ndef training():\n    return {made}\n")
    config = write_stage(world, folder / "run", "align", steps=2)
    content = yaml.safe_load(config.read_text())
    options = {"pipeline": "my_pipeline.training", "val": world.data("vqa", "test"), "batch_size": BATCH}
    reading = {"num_workers": workers}
    content["data"] = {"class_path": "datamodules.OwnPipeline", "init_args": {**options, "reading": reading}}
    config.write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(config)]


@pytest.mark.slow
def test_two_ranks_share_a_pipeline_and_the_same_samples_on_both_are_refused(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ranks = ["--allow-class-path", "my_pipeline", "--trainer.devices=2", "--trainer.strategy=ddp"]
    run_rounds([(2, [[*write_own(tiny_world, tmp_path, "webdataset.split_by_node", 0), *ranks]])], tmp_path)
    assert read_json(tmp_path / "run" / "stage.json")["steps"] == 2
    alike = [*write_own(tiny_world, tmp_path, "iter", 0), *ranks, "--fresh"]
    with pytest.raises(AssertionError, match="gives each of 2 ranks samples of its own"):
        run_rounds([(2, [alike])], tmp_path)


@pytest.mark.slow
def test_a_stage_file_names_the_function(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    command = write_own(tiny_world, tmp_path, "None", 2)
    with pytest.raises(UserError, match="my_pipeline"):
        cli.run(command)
    cli.run([*command, "--allow-class-path", "my_pipeline"])
    again = ["fit", "--config", str(tmp_path / "run" / "config.yaml"), "--allow-class-path", "my_pipeline"]
    with caplog.at_level(logging.WARNING, logger="datamodules"):
        assert cli.run([*again, "--trainer.max_steps=4"]).trainer.global_step == 4
    assert f"of the {2 * BATCH} samples" in caplog.text
