"""What does a training step of a whole model cost, extended or fully fine-tuned, optimizer included?

    python benchmarks/step.py --json step.json
    python benchmarks/step.py --quick
    python benchmarks/step.py --threads 2 --rounds 5 --write

A random Mixtral behind a projector, on sequences of which a quarter is image and an eighth is learned. Every
case starts from the same weights and, as new experts start as copies that change nothing, computes the same
loss; its difference to the first case stands beside each time. FLOPs are those executed, forward and backward.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import DTYPES, Row, executed_flops, finish, interleaved, parse, saved_bytes
from torch import Tensor, nn

from datamodules.word_tokenizer import word_tokenizer
from moextend_pl.contracts import IGNORE_INDEX, Batch, ExtensionPlan, LayerGrowth, TrainPlan
from moextend_pl.models.base_model import ComputeSpec
from moextend_pl.models.fusion import scatter_features
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.projector import Projector
from moextend_pl.moe import dispatch
from moextend_pl.training.losses import token_loss
from moextend_pl.training.optim import OptimSpec, apply_train_plan, build_optimizer

NEW = ("new_experts", "new_routers", "calibration")


@dataclass(frozen=True)
class Size:
    """Sizes of model and batch; T = batch * sequence tokens."""

    layers: int = 6
    width: int = 256
    inner: int = 512
    experts: int = 8
    vocabulary: int = 8192
    batch: int = 4
    sequence: int = 256


@dataclass(frozen=True)
class Case:
    """One way to train: which layers are extended, what learns, how experts and the loss are computed."""

    name: str
    implementation: str
    first_extended: int | None = None
    projector: bool = True
    label_only: bool = True
    on_page: bool = False


def cases(size: Size) -> list[Case]:
    """Returns the cases; the first is the one that others are compared with."""
    frozen, half = dispatch.FROZEN_EXPERTS, size.layers // 2
    return [
        Case("full fine-tuning, transformers eager", "eager", label_only=False, on_page=True),
        Case("full fine-tuning, transformers grouped_mm", "grouped_mm", label_only=False),
        Case("full fine-tuning, loss at labels only", "grouped_mm", on_page=True),
        Case("all layers extended, projector learns", frozen, 0, label_only=False),
        Case("all layers extended, projector learns, loss at labels only", frozen, 0, on_page=True),
        Case("upper half extended, projector frozen", frozen, half, projector=False, label_only=False),
        Case("upper half extended, projector frozen, loss at labels only", frozen, half, projector=False, on_page=True),
        Case("the same with grouped_mm", "grouped_mm", half, projector=False),
    ]


class Trained(nn.Module):
    """Projector and language model of one case, with their optimizer."""

    def __init__(self, case: Case, size: Size, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.case = case
        torch.manual_seed(0)
        self.projector = Projector(kind="mlp2x_gelu", in_features=size.width, out_features=size.width)
        self.projector.build()
        self.language = language_model(case, size)
        self.to(device=device, dtype=dtype)
        parts = {**self.projector.parts(), **self.language.parts()}
        full = case.first_extended is None
        learning = [name for name in parts if parts[name] and (full or name in NEW)]
        apply_train_plan(parts, TrainPlan(tuple({*learning, "projector"} if case.projector else learning)))
        self.train()
        self.optimizer, _ = build_optimizer(self.parameters(), OptimSpec(lr=1e-5), total_steps=1000)

    def loss(self, batch: Batch, features_IPC: Tensor) -> Tensor:
        """Runs the forward pass as `MoExtend` does, without the balance loss, which all cases would share."""
        embeddings = self.language.embed(batch["input_ids"])
        places = (batch["input_ids"] == self.language.image_token_id).flatten().nonzero().squeeze(-1)
        embeddings = scatter_features(embeddings, self.projector(features_IPC), places)
        if self.case.label_only:
            return self.language.losses(batch, embeddings, balanced=False).token
        logits = self.language(batch, embeddings)
        return token_loss(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def step(self, batch: Batch, features_IPC: Tensor) -> None:
        """Does one step."""
        self.loss(batch, features_IPC).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_bytes(self) -> int:
        """Counts the bytes of gradients and optimizer states."""
        gradients = sum(p.numel() * p.element_size() for p in self.parameters() if p.requires_grad)
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return gradients + sum(value.numel() * value.element_size() for value in states)


def language_model(case: Case, size: Size) -> MoELanguageModel:
    """Builds the language model of a case through the project's own path."""
    config: dict[str, Any] = {
        "model_type": "mixtral", "vocab_size": size.vocabulary, "hidden_size": size.width,
        "intermediate_size": size.inner, "num_hidden_layers": size.layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": size.experts, "num_experts_per_tok": 2,
        "max_position_embeddings": size.sequence, "initializer_range": 0.05,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        word_tokenizer(["a word"]).save_pretrained(folder)
        model = MoELanguageModel(base=config, tokenizer=folder, compute=ComputeSpec(case.implementation))
        if case.first_extended is not None:
            layers = range(case.first_extended, size.layers)
            model.extension_plan = ExtensionPlan(layers=tuple(LayerGrowth(layer, (1,)) for layer in layers))
        model.configure_model()
        assert model.image_token_id == size.vocabulary  # reads the tokenizer while it is there
    return model


def make_batch(size: Size, dtype: torch.dtype, device: str) -> tuple[Batch, Tensor]:
    """Returns random ids behind one image a sequence, and the image's features."""
    generator = torch.Generator("cpu").manual_seed(1)
    ids = torch.randint(8, size.vocabulary, (size.batch, size.sequence), generator=generator, device="cpu")
    places = size.sequence // 4
    ids[:, :places] = size.vocabulary
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -size.sequence // 8 :] = ids[:, -size.sequence // 8 :]
    features = torch.randn(size.batch, places, size.width, generator=generator, device="cpu").to(device, dtype)
    batch: Batch = {
        "keys": [str(n) for n in range(size.batch)], "input_ids": ids.to(device), "labels": labels.to(device),
        "attention_mask": torch.ones_like(ids).to(device), "pixel_values": torch.empty(0), "image_keys": [],
    }  # fmt: skip
    return batch, features


def compare(size: Size, dtype: str, options: argparse.Namespace) -> list[Row]:
    """Times all cases of one size; `speed` is relative to the first case."""
    batch, features = make_batch(size, DTYPES[dtype], options.device)
    models = {case.name: Trained(case, size, DTYPES[dtype], options.device) for case in cases(size)}
    facts: dict[str, Row] = {}
    for name, model in models.items():
        forward: Callable[[], Tensor] = lambda model=model: model.loss(batch, features)  # noqa: E731
        loss = float(forward().detach())
        kept = saved_bytes(forward, [*model.parameters(), *model.buffers()])
        flops = executed_flops(lambda forward=forward: forward().backward())
        peak = _peak(model, batch, features) if options.device.startswith("cuda") else None
        model.step(batch, features)
        facts[name] = {
            "loss": loss, "kept_MB": kept / 2**20, "state_MB": model.state_bytes() / 2**20,
            "peak_MB": peak, "GFLOP": flops / 1e9,
        }  # fmt: skip
    times = interleaved(
        {name: lambda model=model: model.step(batch, features) for name, model in models.items()}, options
    )
    first = next(iter(models))
    return [
        {
            "dtype": dtype, "case": name, **times[name],
            "speed": round(times[first]["median_ms"] / times[name]["median_ms"], 3), **facts[name],
            "loss_diff": abs(facts[name]["loss"] - facts[first]["loss"]) / abs(facts[first]["loss"]),
        }
        for name in models
    ]  # fmt: skip


def _peak(model: Trained, batch: Batch, features: Tensor) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.step(batch, features)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def page_rows(rows: Sequence[Row], size: Size) -> list[Row]:
    """Returns the rows of the page: one for each of its cases, both types beside each other; none if one is missing."""
    measured = {(row["case"], row["dtype"]): row for row in rows}
    if len(measured) < len(cases(size)) * len(DTYPES):
        return []
    return [
        {
            "step": name, **{dtype: f"{measured[name, dtype]['speed']:.2f}x" for dtype in DTYPES},
            "kept for backward, fp32": f"{measured[name, 'fp32']['kept_MB']:.0f} MB",
            "optimizer and gradients, fp32": f"{measured[name, 'fp32']['state_MB']:.0f} MB",
            "executed GFLOP": f"{measured[name, 'fp32']['GFLOP']:.1f}",
        }
        for name in (case.name for case in cases(size) if case.on_page)
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one table and returns the exit code."""
    options = parse(__doc__.splitlines()[0], argv, on_page=True)
    size = Size(layers=2, width=32, inner=32, vocabulary=64, batch=2, sequence=32) if options.quick else Size()
    rows = [row for dtype in options.dtype for row in compare(size, dtype, options)]
    return finish(__doc__.splitlines()[0], {f"one step of {size}": rows}, options, page_rows(rows, size))


if __name__ == "__main__":
    sys.exit(main())
