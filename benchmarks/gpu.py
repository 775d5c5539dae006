"""What does a training step of a model of real shape cost on one GPU, extended or fully fine-tuned?

    python benchmarks/gpu.py --out runs/gpu
    python benchmarks/gpu.py --shape olmoe --case extended --case compiled --kernels

Weights are random, shapes are those of the published models; a batch is 4 sequences of 2,048 tokens, a quarter of
them image placeholders, an eighth learned. The projector learns, so that gradients run through all layers. Useful
operations count 2 for each weight and token forward, as many for the gradient of activations, half as many again for
the gradients of weights where all learn, and attention; the ceiling is a plain 8192^3 product on the same card.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import Row, table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from datamodules.word_tokenizer import word_tokenizer
from moextend_pl.contracts import IGNORE_INDEX, Batch, ExtensionPlan, LayerGrowth, TrainPlan
from moextend_pl.models.base_model import ComputeSpec
from moextend_pl.models.fusion import scatter_features
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.projector import Projector
from moextend_pl.plan.cost import RunShape, memory
from moextend_pl.plan.facts import Network
from moextend_pl.plan.shapes import read_shape
from moextend_pl.runs.atomic import write_json
from moextend_pl.training.half_precision import default_dtype
from moextend_pl.training.optim import OptimSpec, apply_train_plan, build_optimizer

NEW = ("new_experts", "new_routers", "calibration")
SEQUENCES, LENGTH, NEW_EXPERTS = 4, 2048, 1
SHAPES: dict[str, dict[str, Any]] = {
    "olmoe": {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    "mixtral": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
}  # fmt: skip
CASES: dict[str, tuple[bool, ComputeSpec]] = {
    "extended": (True, ComputeSpec()),
    "compiled": (True, ComputeSpec(compile=True)),
    "grouped_mm": (True, ComputeSpec("grouped_mm")),
    "full": (False, ComputeSpec("grouped_mm")),
    "full compiled": (False, ComputeSpec("grouped_mm", compile=True)),
}


def language_model(config: dict[str, Any], extended: bool, compute: ComputeSpec, device: str) -> MoELanguageModel:
    """Returns a random language model on a device, its upper half extended where that is asked for."""
    layers = config["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder, default_dtype(torch.bfloat16), torch.device(device):
        word_tokenizer(["a word"]).save_pretrained(folder)
        model = MoELanguageModel(base=dict(config), tokenizer=folder, compute=compute)
        if extended:
            grown = tuple(LayerGrowth(layer, (1,) * NEW_EXPERTS) for layer in range(layers // 2, layers))
            model.extension_plan = ExtensionPlan(layers=grown)
        model.configure_model()
        assert model.image_token_id == config["vocab_size"]  # reads the tokenizer while it is there
    return model


def planned_bytes(config: dict[str, Any], compute: ComputeSpec) -> float:
    """Returns the memory that `plan` predicts for an extended case."""
    model, width = language_model(config, True, compute, "meta"), config["hidden_size"]
    apply_train_plan(model.parts(), TrainPlan(NEW))
    # Of the projector its inputs and hidden values matter, and that gradients run through all layers.
    projector = Network(forward=0, backward=0, saved=LENGTH // 4 * width * 2 * 3, learns=True)
    shape = replace(read_shape(model, 2), projector=projector)
    run = RunShape(
        gpus=1, micro_batch=SEQUENCES, accumulate=1, steps=1, length=LENGTH, mean_length=LENGTH,
        learned=LENGTH // 8, compiled=compute.compile,
    )  # fmt: skip
    # `plan` counts a mask of attention for each layer; sequences without padding have none.
    masks = config["num_hidden_layers"] * SEQUENCES * LENGTH * LENGTH * 2
    return memory(shape, run).total - masks


class Trained(nn.Module):
    """Projector and language model of one case on the GPU, with their optimizer."""

    def __init__(self, config: dict[str, Any], extended: bool, compute: ComputeSpec) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.language = language_model(config, extended, compute, "cuda")
        with default_dtype(torch.bfloat16), torch.device("cuda"):
            self.projector = Projector(kind="mlp2x_gelu", in_features=width, out_features=width)
            self.projector.build()
        parts = {**self.projector.parts(), **self.language.parts()}
        names = (*NEW, "projector") if extended else tuple(name for name in parts if parts[name])
        apply_train_plan(parts, TrainPlan(names))
        self.to("cuda").train()
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = (
            build_optimizer(learning, OptimSpec(lr=1e-5), total_steps=1000)[0]
            if extended
            else torch.optim.AdamW(learning, lr=1e-5, fused=True)
        )

    def step(self, batch: Batch, features_IPC: Tensor) -> None:
        """Does one step as `MoExtend` does."""
        embeddings = self.language.embed(batch["input_ids"])
        embeddings = scatter_features(embeddings, self.projector(features_IPC), batch["known"].images)
        self.language.losses(batch, embeddings).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make_batch(model: MoELanguageModel, config: dict[str, Any]) -> tuple[Batch, Tensor]:
    """Returns random ids behind one image a sequence, and the image's features, on the GPU."""
    generator, places = torch.Generator("cpu").manual_seed(1), LENGTH // 4
    ids = torch.randint(8, config["vocab_size"], (SEQUENCES, LENGTH), generator=generator, device="cpu")
    ids[:, :places] = model.image_token_id
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -LENGTH // 8 :] = ids[:, -LENGTH // 8 :]
    features = torch.randn(SEQUENCES, places, config["hidden_size"], generator=generator, device="cpu")
    batch: Any = model.with_host_facts({
        "keys": [str(n) for n in range(SEQUENCES)], "input_ids": ids, "labels": labels,
        "attention_mask": torch.ones_like(ids), "pixel_values": torch.empty(0), "image_keys": ["a"] * SEQUENCES,
    })  # fmt: skip
    known = batch["known"]
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in batch.items()}
    on_gpu = [value.cuda() if isinstance(value, Tensor) else value for value in known]
    moved["known"] = type(known)(*on_gpu)
    return moved, features.to("cuda", torch.bfloat16)  # type: ignore[return-value]


def useful_operations(config: dict[str, Any], extended: bool) -> float:
    """Counts the operations of a step that no implementation avoids."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim", width // heads)
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    attention = width * head * (2 * heads + 2 * config["num_key_value_heads"])
    layer = attention + 3 * width * inner * config["num_experts_per_tok"]
    weights = config["num_hidden_layers"] * layer + width * config["vocab_size"] / 8
    scores = config["num_hidden_layers"] * 2 * heads * head * LENGTH / 2
    products = (4 if extended else 6) * weights + 2 * 3 * scores
    return SEQUENCES * LENGTH * products


def ceiling() -> float:
    """Measures operations a second of a plain 8192^3 product in bf16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / timed(lambda: a @ b, 10)


def timed(step: Callable[[], object], rounds: int) -> float:
    """Returns the median of seconds a call, after three that are not counted."""
    times = []
    for number in range(rounds + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start if number >= 3 else 0.0)
    return statistics.median(times[3:])


def waits(step: Callable[[], object]) -> Counter[str]:
    """Counts how often a step waits for the device, by line of code."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{one.filename}:{one.lineno}" for one in found if "synchroniz" in str(one.message))


def kernels(step: Callable[[], object]) -> tuple[int, str]:
    """Counts the kernels that a step starts, and tells which take the time."""
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    averages = record.key_averages()
    started = sum(one.count for one in averages if one.self_device_time_total > 0)  # the rest are calls of the driver
    return started, averages.table(sort_by="cuda_time_total", row_limit=25)


def measure(shape: str, case: str, rounds: int, peak_rate: float, show: bool) -> Row:
    """Times one case on an empty card."""
    config, (extended, compute) = SHAPES[shape], CASES[case]
    model = Trained(dict(config), extended, compute)
    batch, features = make_batch(model.language, config)
    step = lambda: model.step(batch, features)  # noqa: E731
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, rounds)
    peak = torch.cuda.max_memory_allocated() / 1e9
    (started, longest), waited = kernels(step), waits(step)
    if show:
        print(longest, *waited.items(), sep="\n")
    return {
        "shape": shape, "case": case, "ms": 1000 * seconds, "tokens/s": SEQUENCES * LENGTH / seconds, "peak GB": peak,
        "planned GB": planned_bytes(config, compute) / 1e9 if extended else float("nan"),
        "of ceiling": useful_operations(config, extended) / seconds / peak_rate, "kernels": started,
        "waits": waited.total(), "first step s": first,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES), help="by default all")
    parser.add_argument("--case", action="append", choices=list(CASES), help="by default all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kernels", action="store_true", help="show which kernels take the time")
    parser.add_argument("--out", type=Path, help="folder for report.md and report.json")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device was found; these numbers are of a GPU")
    peak_rate, rows = ceiling(), []
    for shape in options.shape or SHAPES:
        for case in options.case or CASES:
            rows.append(measure(shape, case, options.rounds, peak_rate, options.kernels))
            gc.collect()
            torch.cuda.empty_cache()
            torch._dynamo.reset()
    report = f"{torch.cuda.get_device_name()}, ceiling {peak_rate / 1e12:.0f} TFLOP/s\n\n{table(rows)}"
    print(report)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "report.json", {"card": torch.cuda.get_device_name(), "rows": rows})
        (options.out / "report.md").write_text(f"{report}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
