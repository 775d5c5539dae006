"""What does the data plane cost? One function a question; each gives rows for the table and for the JSON file.

    python benchmarks/data.py --json runs/data.json
    python benchmarks/data.py --quick --only index

Run it on a quiet machine with OMP_NUM_THREADS=1: images are measured on one core. Ways are timed in turn, round by
round, so that a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from transformers import CLIPImageProcessor

from datamodules.index import Shard, save_index
from datamodules.keys import Keys
from datamodules.llava import BuildOptions, build_from_llava
from datamodules.order import Order
from datamodules.reader import ShardReader
from datamodules.shards import conversation
from moextend_pl.contracts import SampleSpec
from moextend_pl.samples.pixels import PixelTransform, decode_image

SIDE, SIZE, QUALITY = 336, (640, 480), 90
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, as the reference uses them."""

Rows = list[dict[str, Any]]


def main(argv: list[str]) -> int:
    """Answers the questions, prints a table of each, and writes all rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works; numbers mean nothing")
    parser.add_argument("--only", nargs="+", choices=sorted(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    answers = {}
    for name in options.only:
        print(f"\n{name}: {QUESTIONS[name].__doc__.splitlines()[0]}")
        answers[name] = QUESTIONS[name](options.quick)
        print_table(answers[name])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine(), "quick": options.quick, **answers}, indent=1) + "\n")
    return 0


def machine() -> dict[str, Any]:
    """Returns what the numbers depend on besides the code."""
    packages = ("torch", "Pillow", "webdataset", "transformers", "numpy")
    return {
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
    }


def print_table(rows: Rows) -> None:
    """Prints rows of equal keys."""
    texts = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), *texts]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times each way once a round, after one round that does not count; returns seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# --- images per second and core ---------------------------------------------------------------------------------


def images_per_second(quick: bool) -> Rows:
    """Images per second and core, 640 x 480 JPEGs to 336 x 336 normalised floats."""
    count, rounds = (8, 1) if quick else (256, 7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entries = write_llava(folder, count)
        options = {"original": BuildOptions(), "resized": BuildOptions(resize=SIDE, square=True)}
        for kind, how in options.items():
            build_from_llava(folder / "data.json", folder, folder / kind, how)
        ways = {
            "a: JSON list, PIL, HF processor on PIL": lambda: reference(folder, entries, pil_processor()),
            "a2: JSON list, PIL, HF processor on torchvision": lambda: reference(folder, entries, fast_processor()),
        }
        for kind in options:
            ways[f"b: webdataset, {kind} size"] = lambda kind=kind: plain_webdataset(folder / kind)
            ways[f"shards, {kind} size"] = lambda kind=kind: our_shards(folder / kind)
        difference = resized_difference(folder)
        seconds = interleaved(ways, rounds)
    rates = {name: [count / value for value in values] for name, values in seconds.items()}
    base = statistics.median(rates["a: JSON list, PIL, HF processor on PIL"])
    rows = []
    for name, values in rates.items():
        middle = statistics.median(values)
        kind = "resized" if "resized" in name else "original"
        beside = statistics.median(rates[f"b: webdataset, {kind} size"])
        row = {"way": name, "median": middle, "least": min(values), "most": max(values)}
        rows.append({**row, "times a": middle / base, "times b": middle / beside})
    rows[-1]["note"] = f"resized differ from original by {difference:.2f} of 255 on average"
    for row in rows:
        row.setdefault("note", "")
    return rows


def photograph(rng: np.random.Generator) -> Image.Image:
    """Makes a picture with shapes and grain, which compresses like a photograph."""
    width, height = SIZE
    shapes = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    smooth = np.asarray(shapes.resize(SIZE, Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8))


def write_llava(folder: Path, count: int) -> list[dict[str, Any]]:
    """Writes images and their LLaVA JSON; returns its entries."""
    rng = np.random.default_rng(0)
    entries = []
    for number in range(count):
        name = f"{number:06d}.jpg"
        photograph(rng).save(folder / name, "JPEG", quality=QUALITY)
        turns = conversation(("<image>\nWhat is shown?", "Shapes with grain."))
        entries.append({"id": f"{number:06d}", "image": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(entries))
    return entries


def spec() -> SampleSpec:
    """Returns what a model with CLIP ViT-L/14-336 asks for; the tokenizer is not used."""
    return SampleSpec(None, 0, 576, SIDE, MEAN, STD)  # type: ignore[arg-type]


def pil_processor() -> Any:
    """Returns transformers' processor as the reference has it, on PIL and numpy."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as OnPil
    except ImportError:  # until transformers 5 it was the only one
        OnPil = CLIPImageProcessor
    return OnPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def fast_processor() -> Any:
    """Returns transformers' processor of today, on torchvision."""
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def reference(folder: Path, entries: list[dict[str, Any]], processor: Any) -> None:
    """Opens each image of the list in the training process, as MoExtend and LLaVA do."""
    for entry in entries:
        image = Image.open(folder / entry["image"]).convert("RGB")
        processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


def plain_webdataset(folder: Path) -> None:
    """Streams the tars with webdataset in their own order, decoding as we do."""
    transform = PixelTransform(spec())
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        json.loads(sample["json"])
        transform(decode_image(sample["jpg"], sample["__key__"]))


def our_shards(folder: Path) -> None:
    """Reads the same tars by their index in a shuffled order."""
    transform = PixelTransform(spec())
    for image in shuffled_images(folder):
        transform(image)


def shuffled_images(folder: Path) -> Iterator[Image.Image]:
    """Yields the images of a folder in the order of an epoch."""
    reader = ShardReader(folder)
    for number in Order([len(shard) for shard in reader.shards], 0).epoch(0).tolist():
        raw = reader.read(number)
        yield from (decode_image(data, raw.origin) for data in raw.images)
    reader.close()


def resized_difference(folder: Path) -> float:
    """Returns how far pixels of resized shards lie from those of original ones, of 255, on average."""
    transform = PixelTransform(SampleSpec(None, 0, 576, SIDE, (0.0,) * 3, (1.0,) * 3))  # type: ignore[arg-type]
    pairs = zip(shuffled_images(folder / "original"), shuffled_images(folder / "resized"), strict=True)
    return statistics.mean(float((transform(a) - transform(b)).abs().mean()) * 255 for a, b in pairs)


# --- start-up with a large index ---------------------------------------------------------------------------------


OPENING = """
import json, sys, time
from pathlib import Path

def peak():  # not ru_maxrss, which a child takes over from its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

start = time.perf_counter()
from datamodules.reader import ShardReader
imports, imported = time.perf_counter() - start, peak()
start = time.perf_counter()
reader = ShardReader(sys.argv[1])
opened = time.perf_counter() - start
keys = [reader.describe(number)[1] for number in range(0, len(reader), max(len(reader) // 1000, 1))]
after = peak()
print(json.dumps({"import s": imports, "open s": opened, "peak MiB": after, "of it for the index": after - imported}))
"""


def start_of_an_index(quick: bool) -> Rows:
    """Seconds and memory to open an index, each time in a new process."""
    rows = []
    for samples in (10_000,) if quick else (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as name:
            write_index(Path(name), samples)
            size = sum(path.stat().st_size for path in Path(name).glob("index.*")) / 2**20
            found = []
            for _ in range(1 if quick else 5):
                done = subprocess.run([sys.executable, "-c", OPENING, name], check=True, capture_output=True, text=True)
                found.append(json.loads(done.stdout))
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            rows.append({"samples": samples, "index MiB": size, **middle, "slowest s": max(o["open s"] for o in found)})
    return rows


def write_index(folder: Path, samples: int, each: int = 1000) -> None:
    """Writes an index of shards with one image a sample; the shards themselves are holes of the right size."""
    shards = []
    for first in range(0, samples, each):
        members = np.empty((2 * each, 3), dtype=np.int64)
        members[:, 0] = np.tile([0, 1], each)
        members[:, 1] = 512 + 1024 * np.arange(2 * each)
        members[:, 2] = 400
        keys = Keys.of([f"{number:012d}" for number in range(first, first + each)])
        turns, starts = np.ones(each, np.int32), 2 * np.arange(each + 1)
        name, size = f"{first // each:05d}.tar", 1024 * (2 * each + 1)
        with (folder / name).open("wb") as stream:
            stream.truncate(size)
        shards.append(Shard(name, size, "0" * 64, keys, turns, starts, members, ["json", "jpg"], each))
    save_index(folder, shards)


# --- checksums --------------------------------------------------------------------------------------------------


def checksums(quick: bool) -> Rows:
    """Microseconds a sample of one core, 640 x 480 JPEGs, with and without the checksum of each."""
    count, rounds = (8, 1) if quick else (256, 15)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_llava(folder, count)
        build_from_llava(folder / "data.json", folder, folder / "shards", BuildOptions())
        checked, trusting = ShardReader(folder / "shards"), ShardReader(folder / "shards")
        for shard in trusting.shards:
            shard.checksums = None
        ways: dict[str, Callable[[], object]] = {}
        for label, reader in (("checked", checked), ("not checked", trusting)):
            ways[f"read, {label}"] = lambda reader=reader: [reader.read(n) for n in range(len(reader))]
            ways[f"read and decode, {label}"] = lambda reader=reader: decoded(reader)
        seconds = interleaved(ways, rounds)
        size = checked.shards[0].size / count
    return [
        {
            "way": way,
            "median": 1e6 * statistics.median(times) / count,
            "least": 1e6 * min(times) / count,
            "KiB": size / 1024,
        }
        for way, times in seconds.items()
    ]


def decoded(reader: ShardReader) -> None:
    """Reads every sample and makes pixel values of its images."""
    transform = PixelTransform(spec())
    for number in range(len(reader)):
        raw = reader.read(number)
        for data in raw.images:
            transform(decode_image(data, raw.origin))


QUESTIONS: dict[str, Callable[[bool], Rows]] = {
    "images": images_per_second,
    "index": start_of_an_index,
    "checksums": checksums,
}
"""Name -> function; a new question is one more function here."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
