"""Shards with one fault each, for the matrices of faults."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers.data_options import grouped
from PIL import Image

from datamodules import ImageTextShards
from moextend_pl.contracts import SampleSpec

Members = list[tuple[str, bytes]]


def conversation_json(question: str = "<image>\nwhat ?", answer: str = "red") -> bytes:
    """Returns KEY.json with one turn."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": turns}).encode()


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Returns an image file's content."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def plain_image(number: int = 0, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    """Returns a picture of one colour that tells its number."""
    return encoded(Image.new("RGB", size, (number % 256, number // 256, 7)), kind)


def bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    """Returns a PNG of a hundred bytes that declares any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def write_tar(path: Path, members: Members, mode: str = "w", form: int = tarfile.PAX_FORMAT) -> Path:
    """Writes a tar file."""
    with tarfile.open(path, mode, format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


GOOD = [("good.json", conversation_json()), ("good.png", plain_image(1))]


def rank(folder: Path, spec: SampleSpec, number: int, world: int, run: Path, **options: Any) -> ImageTextShards:
    """A data module as a trainer of several processes would hold it."""
    module = ImageTextShards(**grouped(train=str(folder), spec=spec, **{"batch_size": 4, **options}))
    module.trainer = SimpleNamespace(
        global_rank=number,
        world_size=world,
        default_root_dir=str(run),
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0)))
        ),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )
    module.setup("fit")
    return module


def batches(module: ImageTextShards, count: int) -> list[dict[str, Any]]:
    """Returns the first batches of the training set."""
    loader = iter(module.train_dataloader())
    return [next(loader) for _ in range(count)]


def bad_lines(run: Path) -> list[dict[str, str]]:
    """Returns what a run noted about bad samples."""
    path = run / "bad_samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
