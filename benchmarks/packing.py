"""How many real tokens a second does training see, by the way its batches are made?

    python benchmarks/packing.py --json runs/packing.json
    python benchmarks/packing.py --quick

End to end: shards are read, decoded, encoded and collated, and an extended model takes optimizer steps on them.
Lengths are drawn like those of LLaVA-1.5 conversations: 94 % have one image, of 576 tokens, and a log-normal text
(median 180 tokens, sigma 0.8); 6 % are texts alone (median 600, sigma 0.9); longer than 2,048 is cut. All of it is
divided by 9, so that the image has 64 tokens and the longest sample 227, and a processor can do it. Ways are timed
in turn, round by round, so that a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from datamodules.image_text import ImageTextShards
from datamodules.options import ReadingSpec, RowSpec
from datamodules.shards import Entry, conversation, write_shards
from datamodules.word_tokenizer import word_tokenizer
from moextend_pl.contracts import IGNORE_INDEX, Batch, ExtensionPlan, LayerGrowth, SampleSpec, TrainPlan
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.models.tower import FeatureSpec

SCALE = 9
LONGEST = 2048 // SCALE
IMAGE_SHARE, IMAGE_SIDE, IMAGE_TOKENS = 0.94, 64, 576 // SCALE
TEXT_WITH_IMAGE, TEXT_ALONE = (180, 0.8), (600, 0.9)
TEMPLATE_TOKENS = 4  # <s> [INST] [/INST] </s>
WORDS = [f"w{number}" for number in range(500)]
TRAINED = ("projector", "new_experts", "new_routers", "calibration")


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        samples: Samples of the shard set.
        rows: Rows of a batch.
        steps: Optimizer steps of a way in a round.
        rounds: Rounds that count.
        width: Width of the language model.
        layers: Its layers.
        experts: Experts of a layer.
    """

    samples: int = 4000
    rows: int = 16
    steps: int = 6
    rounds: int = 7
    width: int = 256
    layers: int = 4
    experts: int = 8


QUICK = Size(samples=120, rows=4, steps=1, rounds=1, width=32, layers=2, experts=4)


def main(argv: list[str]) -> int:
    """Prints a table of the ways and writes it as JSON; 1 if packing is less than 1.8 times as fast as padding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works; numbers mean nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(argv)
    size = QUICK if options.quick else Size()
    with tempfile.TemporaryDirectory() as name:
        model = build_model(Path(name), size).to(options.device)
        lengths = write_samples(Path(name) / "data", size.samples)
        rows = measure(model, str(Path(name) / "data"), size, options.num_workers)
    print(f"tokens of a sample: mean {np.mean(lengths):.0f}, median {np.median(lengths):.0f}, longest {max(lengths)}")
    print_table(rows)
    if options.json:
        facts = {"machine": machine(options.device), "quick": options.quick, "size": asdict(size)}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "lengths": describe(lengths), "ways": rows}, indent=1) + "\n")
    speedup = rows[-1]["times padding to the longest"]
    if not options.quick and speedup < 1.8:
        print(f"FAILED: packing is {speedup:.2f} times as fast as padding, expected 1.8", file=sys.stderr)
        return 1
    return 0


def build_model(folder: Path, size: Size) -> MoExtend:
    """Writes a random Mixtral with its tokenizer and returns it with a tower, extended in every second layer."""
    tokenizer = word_tokenizer(WORDS)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=size.width, intermediate_size=2 * size.width, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=size.layers, num_local_experts=size.experts, num_experts_per_tok=2,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = MoExtend(
        encoder=VisionEncoder(name="timm/test_resnet", features=FeatureSpec(layer=2), image_size=IMAGE_SIDE),
        projector=Projector(kind="mlp2x_gelu"),
        language=MoELanguageModel(base=str(folder / "base")),
        cache_features=False,
    )
    layers = tuple(LayerGrowth(layer, (0,)) for layer in range(0, size.layers, 2))
    model.extension_plan = ExtensionPlan(layers=layers)
    model.train_plan = TrainPlan(TRAINED)
    model.configure_model()
    return model.train()


def write_samples(folder: Path, count: int) -> list[int]:
    """Writes shards of the stated distribution and returns the tokens of each sample."""
    generator = np.random.default_rng(0)
    pictures = [picture(generator) for _ in range(32)]
    folder.mkdir()
    entries, lengths = [], []
    for number in range(count):
        has_image = bool(generator.random() < IMAGE_SHARE)
        median, sigma = TEXT_WITH_IMAGE if has_image else TEXT_ALONE
        fixed = TEMPLATE_TOKENS + has_image * IMAGE_TOKENS
        words = int(np.clip(generator.lognormal(np.log(median), sigma) / SCALE, 4, LONGEST - fixed))
        chosen = [WORDS[word] for word in generator.integers(0, len(WORDS), words)]
        asked = max(1, words // 4)
        question = "<image>\n" * has_image + " ".join(chosen[:asked])
        images = (pictures[number % len(pictures)],) if has_image else ()
        entries.append(Entry(f"s{number:06d}", conversation((question, " ".join(chosen[asked:]))), images))
        lengths.append(fixed + words)
    write_shards(entries, folder)
    return lengths


def picture(generator: np.random.Generator) -> bytes:
    """Returns the bytes of a JPEG."""
    stream = io.BytesIO()
    pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


def batches(spec: SampleSpec, folder: str, size: Size, num_workers: int, **options: Any) -> Iterator[Batch]:
    """Returns the endless training batches of a datamodule."""
    data = ImageTextShards(
        train=folder,
        spec=spec,
        batch_size=size.rows,
        rows=RowSpec(max_length=LONGEST, **options),
        reading=ReadingSpec(num_workers=num_workers),
    )
    data.setup("fit")
    return iter(data.train_dataloader())


def to_longest(batch: Batch) -> Batch:
    """Pads a batch to the longest sample of the set, as the reference does."""
    padded: Any = dict(batch)
    missing = LONGEST - batch["input_ids"].shape[1]
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
        padded[name] = F.pad(padded[name], (0, missing), value=value)
    return padded


def measure(model: MoExtend, folder: str, size: Size, num_workers: int) -> list[dict[str, Any]]:
    """Times every way and returns a row for each."""
    spec = model.sample_spec()
    assert spec.tokens_per_image == IMAGE_TOKENS, spec.tokens_per_image
    ways = {
        "padded to the longest": map(to_longest, batches(spec, folder, size, num_workers)),
        "padded to the batch": batches(spec, folder, size, num_workers),
        "padded in buckets": batches(spec, folder, size, num_workers, bucket=8),
        "packed": batches(spec, folder, size, num_workers, packing=True),
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[int]] = {name: [] for name in ways}
    places: dict[str, int] = dict.fromkeys(ways, 0)
    for number in range(size.rounds + 1):  # the first does not count
        for name, way in ways.items():
            start = time.perf_counter()
            seen = [train(model, optimizer, batch) for batch in itertools.islice(way, size.steps)]
            if number:
                seconds[name].append(time.perf_counter() - start)
                tokens[name].append(sum(real for real, _ in seen))
                places[name] += sum(total for _, total in seen)
    rates = {name: statistics.median(t / s for t, s in zip(tokens[name], seconds[name], strict=True)) for name in ways}
    return [
        {
            "way": name,
            "tokens/s": rates[name],
            "times padding to the longest": rates[name] / rates["padded to the longest"],
            "real tokens": sum(tokens[name]) / places[name],
            "slowest round": min(t / s for t, s in zip(tokens[name], seconds[name], strict=True)),
        }
        for name in ways
    ]


def train(model: MoExtend, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[int, int]:
    """Takes a step; returns real tokens and places of the batch."""
    moved: Any = model.transfer_batch_to_device(batch, model.device, 0)
    model(moved).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return int(batch["attention_mask"].sum()), batch["attention_mask"].numel()


def describe(lengths: list[int]) -> dict[str, float]:
    """Returns what the distribution looks like, in tokens."""
    quantiles = {f"{share:.0%}": float(np.quantile(lengths, share)) for share in (0.05, 0.5, 0.95)}
    return {"mean": float(np.mean(lengths)), **quantiles, "longest": max(lengths), "scale": SCALE}


def machine(device: str) -> dict[str, Any]:
    """Returns what the numbers depend on besides the code."""
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints rows of equal keys."""
    texts = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), *texts]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
