"""`generate`: pictures are read as the data reads them, and every mistake is one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_world import QUESTION, TinyWorld, make_plan
from PIL import Image

from moextend_pl.contracts import UserError
from moextend_pl.inference.pictures import open_picture
from moextend_pl.samples.pixels import decode_image
from moextend_pl.samples.prompt import prompt_batch

GREYS = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)


def test_picture_is_read_as_the_data_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    Image.fromarray(GREYS).save(path)
    got = np.asarray(open_picture(path))
    assert np.array_equal(got, np.asarray(decode_image(path.read_bytes(), "x")))
    assert got[..., 0].max() - got[..., 0].min() == 255
    assert len(np.unique(got)) > 200


def test_sixteen_bit_picture_from_python_is_asked_about_like_one_of_the_data(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    path = tmp_path / "scan.png"
    Image.fromarray(GREYS).save(path)
    spec = tiny_world.model(parts=["projector"]).sample_spec()
    batches = [prompt_batch(spec, image, QUESTION, torch.device("cpu")) for image in
               (Image.open(path), decode_image(path.read_bytes(), "x"))]  # fmt: skip
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])


@pytest.mark.parametrize("with_picture", [True, False])
def test_image_mark_in_a_question_is_refused(tiny_world: TinyWorld, with_picture: bool) -> None:
    model = tiny_world.model(make_plan(init="copy"))
    image = Image.new("RGB", (32, 32)) if with_picture else None
    with pytest.raises(UserError, match="without <image>"):
        model.generate(image, f"<image>\n{QUESTION}")


def test_every_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "moving.gif")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    Image.fromarray(GREYS).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    for name, words in (
        ("nowhere.png", "found no file"), (".", "directory"), ("moving.gif", "Convert it to PNG"),
        ("large.png", "at most 64000000 pixels"), ("cut.png", "cut short"), ("empty.png", "Convert it to PNG"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            open_picture(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
