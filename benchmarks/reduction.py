"""What does AIM save while a prompt is read: operations, time and bytes of the cache, by number of picture tokens?

    python benchmarks/reduction.py --dtype fp32 --clock cpu
    python benchmarks/reduction.py --quick

A random Mixtral reads one prompt of a picture and 100 tokens of text, whole and as each reduction has it, with a cache
as `generate` fills it; merging is part of what is timed. Operations are those of torch's FlopCounterMode, counted in
another pass whose experts and attention are products that it knows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from harness import DTYPES, Row, finish, interleaved, parse
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM

from moextend_pl.inference.reduction import Reduction
from moextend_pl.inference.token_merging import merge_tokens
from moextend_pl.inference.token_pruning import dropping

TEXT = 100
WAYS = (None, "aim_merge", "aim:7,11,0", "aim")
LAYERS = 14


def random_model(dtype: torch.dtype, quick: bool) -> MixtralForCausalLM:
    """Builds a Mixtral of 14 layers."""
    config: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": 32 if quick else 256, "intermediate_size": 32 if quick else 448,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**config)).to(dtype).eval()


@torch.no_grad()
def read(model: MixtralForCausalLM, text: Tensor, picture: Tensor, reduce: str | None) -> int:
    """Reads a prompt as `generate` does and returns the bytes of its cache."""
    merged = merge_tokens(picture, Reduction.parse(reduce).rounds)
    embeddings = torch.cat([text[:, : TEXT // 2], merged, text[:, TEXT // 2 :]], dim=1)
    is_image = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
    is_image[:, TEXT // 2 : TEXT // 2 + merged.shape[1]] = True
    cache: Any = DynamicCache()
    with dropping(model, reduce, is_image, torch.ones_like(is_image)):
        model.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def operations(model: MixtralForCausalLM, step: Callable[[], object]) -> int:
    """Counts what a step computes."""
    usual = model.config._experts_implementation
    model.set_experts_implementation("eager")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    model.set_experts_implementation(usual)
    return counter.get_total_flops()


def compare(count: int, dtype: str, options: Any) -> list[Row]:
    """Compares all ways to read a picture of so many tokens."""
    torch.manual_seed(0)
    model = random_model(DTYPES[dtype], options.quick)
    text, picture = (
        torch.randn(1, n, model.config.hidden_size, dtype=DTYPES[dtype], device="cpu") for n in (TEXT, count)
    )
    steps = {str(way): partial(read, model, text, picture, way) for way in WAYS}
    times = interleaved(steps, options)
    counted = {name: operations(model, step) for name, step in steps.items()}
    cached = {name: step() for name, step in steps.items()}
    return [
        {
            "dtype": dtype, "picture_tokens": count, "reduce": name, **times[name],
            "time": round(times[name]["median_ms"] / times["None"]["median_ms"], 3),
            "operations": round(counted[name] / counted["None"], 3),
            "cache": round(cached[name] / cached["None"], 3),
        }
        for name in steps
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one table and returns the exit code."""
    options = parse(__doc__.splitlines()[0], argv)
    counts = (16, 64) if options.quick else (64, 256, 576, 2000)
    rows = [row for dtype in options.dtype for count in counts for row in compare(count, dtype, options)]
    return finish(__doc__.splitlines()[0], {"one prompt": rows}, options)


if __name__ == "__main__":
    sys.exit(main())
