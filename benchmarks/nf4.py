"""What does a base in 4 bits save, and what does it cost in time and in accuracy?

    python benchmarks/nf4.py [--quick] [--json nf4.json]

A random mixture-of-experts model is written to disk in 16 bits and loaded plain and packed (NF4), each with
fp32 and with bf16 arithmetic. All are extended in the upper half of their layers; a step is forward, backward
and AdamW on what is new. `drift from plain fp32` is what rounding does to the logits of random weights, which
says little about those of a trained model; `error` is against the same numbers unpacked, in fp32.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from harness import DTYPES, Row, difference, finish, interleaved, parse
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from callbacks.train_only import bytes_by_type
from moextend_pl.contracts import ExtensionPlan, LayerGrowth
from moextend_pl.models.base_model import load_base
from moextend_pl.moe.extension.growth import grow, new_parameters
from moextend_pl.moe.extension.reach import Reach
from moextend_pl.moe.nf4 import NF4Weight

FULL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_local_experts": 8}
QUICK = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_local_experts": 4}
REST = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": 1000}
TOKENS = {"quick": (2, 16), "full": (4, 256)}
KINDS = {"plain": None, "NF4": "nf4"}


def write_base(folder: str, sizes: dict[str, int]) -> None:
    """Writes a random base in 16 bits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **REST, initializer_range=0.05))
    model.to(torch.bfloat16).save_pretrained(folder)


def packed_weights(model: PreTrainedModel) -> dict[str, NF4Weight]:
    """Returns the packed weights of a model by the name of the parameter they stand for."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Weight)}


def unpacked_twin(plain: PreTrainedModel, packed: PreTrainedModel) -> PreTrainedModel:
    """Gives a plain fp32 model the numbers that a packed one computes with."""
    with torch.no_grad():
        for name, weight in packed_weights(packed).items():
            plain.get_parameter(name).copy_(weight.operand.unpacked(torch.float32))
    return plain


def training_step(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    """Extends the upper half of a model and returns one step of its training."""
    layers = range(model.config.num_hidden_layers // 2, model.config.num_hidden_layers)
    plan = ExtensionPlan(layers=tuple(LayerGrowth(layer, (0,)) for layer in layers), routing="open")
    reach = Reach()
    grow(model, plan, reach)
    reach.set(torch.ones(len(ids), dtype=torch.bool, device=ids.device))
    new = [parameter.requires_grad_() for group in new_parameters(model).values() for parameter in group]
    optimizer = torch.optim.AdamW(new, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return step


def total(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of tensors."""
    return sum(bytes_by_type(tensors).values())


def bytes_row(name: str, model: PreTrainedModel, weights: dict[str, int]) -> Row:
    """Tells the bytes of a base by type, and what they are of those in bf16.

    Args:
        name: Of the base.
        model: The base.
        weights: Number of weights by parameter name, of those that are packed in a packed base.
    """
    inside = [p for key, p in model.named_parameters() if key in weights or key.rpartition(".")[0] in weights]
    others = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in inside)
    numbers = sum(weights.values())
    return {
        "base": name,
        **dict.fromkeys(("float32 MB", "bfloat16 MB", "uint8 MB")),
        **{f"{kind} MB": size / 1e6 for kind, size in bytes_by_type(model.parameters()).items()},
        "packable / bf16": total(inside) / (2 * numbers),
        "whole / bf16": total(model.parameters()) / (2 * (numbers + others)),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    question = (__doc__ or "").splitlines()[0]
    options = parse(question, argv)
    size = "quick" if options.quick else "full"
    with tempfile.TemporaryDirectory() as folder:
        write_base(folder, QUICK if options.quick else FULL)

        def load(kind: str, dtype: str) -> PreTrainedModel:
            model = load_base(str(Path(folder)), KINDS[kind]).to(device=options.device, dtype=DTYPES[dtype])
            return model.requires_grad_(False).eval()

        models = {(kind, dtype): load(kind, dtype) for kind in KINDS for dtype in options.dtype}
        plain, packed = load("plain", "fp32"), load("NF4", "fp32")
    generator = torch.Generator("cpu").manual_seed(1)
    ids = torch.randint(REST["vocab_size"], TOKENS[size], generator=generator, device="cpu").to(options.device)
    weights = {name: weight.shape.numel() for name, weight in packed_weights(packed).items()}
    sizes = [bytes_row(f"{kind}, {dtype}", model, weights) for (kind, dtype), model in models.items()]
    with torch.no_grad():
        logits = {case: model(ids).logits for case, model in models.items()}
        exact = {"plain": plain(ids).logits}
        exact["NF4"] = unpacked_twin(plain, packed)(ids).logits
    times = interleaved({case: training_step(model, ids) for case, model in models.items()}, options)
    steps: list[Row] = [
        {
            "base": f"{kind}, {dtype}",
            **times[kind, dtype],
            "to plain": times[kind, dtype]["median_ms"] / times["plain", dtype]["median_ms"],
            "error": difference(logits[kind, dtype], exact[kind]),
            "drift from plain fp32": difference(logits[kind, dtype], exact["plain"]),
        }
        for kind, dtype in models
    ]
    title = f"one training step of {ids.shape[0]} x {ids.shape[1]} tokens, and the logits of the base"
    return finish(question, {"bytes of the base": sizes, title: steps}, options)


if __name__ == "__main__":
    sys.exit(main())
