"""Rows of the matrices of faults in single samples; every test names its row."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.data_options import grouped
from helpers.faulty_shards import (
    GOOD,
    bad_lines,
    batches,
    bomb,
    conversation_json,
    encoded,
    plain_image,
    rank,
    write_tar,
)
from PIL import Image

from datamodules import ImageTextShards
from datamodules.index import INDEX_FILE
from datamodules.reader import ShardReader
from datamodules.scan import build_index
from datamodules.shards import Entry, conversation, write_shards
from moextend_pl.contracts import IGNORE_INDEX, UserError

BAD = {
    "jpeg": [("b.json", conversation_json()), ("b.jpg", plain_image(3, (40, 40), "JPEG")[:200])],
    "bomb": [("b.json", conversation_json()), ("b.png", None)],
    "text": [("b.png", plain_image())],
    "caption": [("b.txt", b" \n"), ("b.png", plain_image())],
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_row_19_bad_samples_become_placeholders_within_the_budget_and_stop_the_run_beyond(
    tmp_path, spec, workers, world
):
    members = []
    for number, (name, sample) in enumerate(BAD.items()):
        members += [(f"{name}.{file.partition('.')[2]}", bomb() if data is None else data) for file, data in sample]
        members += [(f"good{number}.json", conversation_json()), (f"good{number}.png", plain_image(number))]
    folder, run = tmp_path / "set", tmp_path / "run"
    folder.mkdir()
    write_tar(folder / "0.tar", members)
    build_index(folder, faults=[])

    def ledger(budget, run):
        ranks = [
            iter(rank(folder, spec, n, world, run, num_workers=workers, max_bad_samples=budget).train_dataloader())
            for n in range(world)
        ]
        return [[next(loader) for loader in ranks] for _ in range(4)]  # two epochs

    steps = ledger(4, run)
    for step in steps:
        for batch in step:
            learned = batch["labels"].ne(IGNORE_INDEX).any(dim=1).tolist()
            assert learned == [key.startswith("good") for key in batch["keys"]]
            assert len(batch["pixel_values"]) == sum(learned)
    keys = [key for step in steps[:2] for batch in step for key in batch["keys"]]
    assert sorted(keys) == sorted([*BAD, *(f"good{n}" for n in range(4))])
    lines = bad_lines(run)
    assert {line["key"]: line["shard"] for line in lines} == dict.fromkeys(BAD, str(folder / "0.tar"))
    reasons = {line["key"]: line["reason"] for line in lines}
    assert "Pillow says" in reasons["jpeg"]
    assert "64000000 pixels" in reasons["bomb"]
    assert "no KEY.json and no KEY.txt" in reasons["text"]
    assert "caption" in reasons["caption"]
    with pytest.raises(UserError, match="at most 3 bad sample.*met 4") as caught:
        ledger(3, tmp_path / "second")
    assert all(f"0.tar: {name}: " in str(caught.value) for name in BAD)


TEXTS = {
    "no text": ([("b.png", plain_image())], "no KEY.json and no KEY.txt"),
    "no image": ([("b.json", conversation_json())], "1 `<image>` in the text for 0 image"),
    "not UTF-8": ([("b.json", b"\xff\xfe{}"), ("b.png", plain_image())], "UTF-8"),
    "caption not UTF-8": ([("b.txt", b"\xff\xfe"), ("b.png", plain_image())], "UTF-8"),
    "empty": ([("b.json", b""), ("b.png", plain_image())], "JSON"),
    "empty answer": ([("b.json", conversation_json(answer=" ")), ("b.png", plain_image())], "expected a text"),
    "deep": ([("b.json", b"[" * 100_000), ("b.png", plain_image())], "JSON"),
    "number too long": ([("b.json", b"1" * 10_000), ("b.png", plain_image())], "JSON"),
    "caption is none": ([("b.json", b'{"caption": null}'), ("b.png", plain_image())], "caption"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_row_26_texts_that_cannot_be_used_are_counted_and_told_by_key(tar_folder, spec, tmp_path, name):
    members, sentence = TEXTS[name]
    folder = tar_folder([*members, *GOOD])
    batches(rank(folder, spec, 0, 1, tmp_path / "run", batch_size=2, max_bad_samples=1), 1)
    (line,) = bad_lines(tmp_path / "run")
    assert (line["key"], line["shard"]) == ("b", str(folder / "0.tar"))
    assert sentence in line["reason"]
    with pytest.raises(UserError, match=r"0.tar: b: "):
        batches(rank(folder, spec, 0, 1, tmp_path / "other", batch_size=2, max_bad_samples=0), 1)


def test_row_26_a_conversation_without_a_token_to_learn_is_counted(tar_folder, spec, tmp_path):
    folder = tar_folder([("long.json", conversation_json("what ? " * 50)), ("s.json", conversation_json("what ?"))])
    module = rank(folder, spec, 0, 1, tmp_path / "run", batch_size=2, max_length=20, max_bad_samples=1)
    (batch,) = batches(module, 1)
    assert batch["labels"].ne(IGNORE_INDEX).any(dim=1).tolist() == [key == "s" for key in batch["keys"]]
    (line,) = bad_lines(tmp_path / "run")
    assert line["key"] == "long"
    assert "no supervised token" in line["reason"]


def noise(mode="RGB", size=(40, 30)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


SIXTEEN = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
FINE = {
    "CMYK": ("jpg", encoded(noise("CMYK"), "JPEG")),
    "16 bit": ("png", encoded(SIXTEEN)),
    "one pixel": ("png", encoded(noise(size=(1, 1)))),
    "one column": ("png", encoded(noise(size=(1, 300)))),
    "palette with alpha": ("png", encoded(noise("RGBA").quantize(8))),
    "animated": ("webp", encoded(noise(), "WEBP", save_all=True, append_images=[noise("L").convert("RGB")])),
    "wrong extension": ("jpg", encoded(noise())),
    "capitals": ("JPG", encoded(noise(), "JPEG")),
}
BROKEN = {
    "cut": ("png", encoded(noise())[:-40], "cut short"),
    "cut jpeg": ("jpg", encoded(noise(), "JPEG")[:-200], "cut short"),
    "empty": ("png", b"", "expected an image"),
    "gif": ("png", encoded(noise(), "GIF"), "PNG, JPEG, WEBP"),
    "postscript": ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PNG, JPEG, WEBP"),
}


@pytest.mark.parametrize("name", FINE)
def test_row_27_unusual_images_are_converted(tar_folder, spec, tmp_path, name):
    extension, data = FINE[name]
    folder = tar_folder([("b.json", conversation_json()), (f"b.{extension}", data)])
    (batch,) = batches(rank(folder, spec, 0, 1, tmp_path / "run", batch_size=1, max_bad_samples=0), 1)
    assert batch["pixel_values"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("name", BROKEN)
def test_row_27_images_that_cannot_be_used_are_counted_and_told_by_key(tar_folder, spec, tmp_path, name):
    extension, data, sentence = BROKEN[name]
    folder = tar_folder([("b.json", conversation_json()), (f"b.{extension}", data), *GOOD])
    batches(rank(folder, spec, 0, 1, tmp_path / "run", batch_size=2), 1)
    (line,) = bad_lines(tmp_path / "run")
    assert line["key"] == "b"
    assert sentence in line["reason"]


@pytest.mark.parametrize(("side", "told"), [(9_000, "9000 x 9000"), (20_000, "400000000 pixels")])
def test_row_27_a_bomb_tells_its_size_and_the_limit_and_is_not_decoded(
    tar_folder, spec, tmp_path, monkeypatch, side, told
):
    folder = tar_folder([("b.json", conversation_json()), ("b.png", bomb(side, side))])
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    batches(rank(folder, spec, 0, 1, tmp_path / "run", batch_size=1), 1)
    (line,) = bad_lines(tmp_path / "run")
    assert "at most 64000000 pixels" in line["reason"]
    assert told in line["reason"]


@pytest.mark.parametrize(("marks", "images"), [(2, 1), (1, 2), (0, 1)])
def test_row_28_marks_that_do_not_fit_the_images_are_told_with_both_counts(tar_folder, spec, tmp_path, marks, images):
    members = [("b.json", conversation_json("<image>" * marks + "what ?"))]
    members += [(f"b.{n}.png", plain_image(n)) for n in range(images)]
    folder = tar_folder(members)
    batches(rank(folder, spec, 0, 1, tmp_path / "run", batch_size=1), 1)
    (line,) = bad_lines(tmp_path / "run")
    assert line["key"] == "b"
    assert f"{marks} `<image>` in the text for {images} image(s)" in line["reason"]
    entry = Entry(
        "b", conversation(("<image>" * marks + "what ?", "red")), tuple(plain_image(n) for n in range(images))
    )
    (tmp_path / "own").mkdir()
    write_shards([entry], tmp_path / "own")
    assert (tmp_path / "own" / INDEX_FILE).is_file()
    with pytest.raises(UserError, match=f"{marks} `<image>` in the text for {images}"):
        ShardReader(tmp_path / "own").read(0)


def test_tests_and_predictions_allow_no_bad_sample(tar_folder, spec):
    folder = tar_folder([("b.json", conversation_json()), *GOOD])
    module = ImageTextShards(**grouped(test={"x": str(folder)}, spec=spec, max_bad_samples=5))
    module.setup("test")
    with pytest.raises(UserError, match=r"0.tar: b: "):
        list(module.test_dataloader()[0])


def test_a_picture_that_is_a_program_too_is_a_picture(tar_folder, spec, tmp_path):
    polyglot = encoded(noise()) + b"PK\x03\x04#!/bin/sh\nrm -rf /\n<script>"
    folder = tar_folder([("b.json", conversation_json()), ("b.png", polyglot)])
    (batch,) = batches(rank(folder, spec, 0, 1, tmp_path / "run", batch_size=1, max_bad_samples=0), 1)
    assert len(batch["pixel_values"]) == 1
