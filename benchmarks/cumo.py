"""Is a step of the upcycled tower faster than the published way, image by image and expert by expert?

    python benchmarks/cumo.py            # one block stack of a real tower's width, batch 16
    python benchmarks/cumo.py --quick    # seconds, for a smoke test

The loop is written from the equations of CuMo (arXiv 2405.05949). Both compute the same outputs and gradients, which
is checked before anything is timed. Prints a table and writes JSON; a ratio is the median of paired steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from moextend_pl.contracts import UpcycleSpec
from moextend_pl.moe.upcycle import UpcycledMLP, upcycle, upcycled_mlps

SIZES = {
    "quick": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
    "full": {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3},
}
TOLERANCE = 1e-4


class LoopedMLP(nn.Module):
    """The same block as the published code computes it: for each image, for each expert.

    Args:
        mlp: Shares its parameters.
    """

    def __init__(self, mlp: UpcycledMLP) -> None:
        super().__init__()
        self.gate, self.experts = mlp.gate, mlp.experts

    def forward(self, x_BND: Tensor) -> Tensor:
        """Computes (B, N, D)."""
        experts, results = self.experts, torch.zeros_like(x_BND)
        probs = torch.softmax(x_BND @ self.gate.weight.T, dim=-1)
        values, chosen = probs.topk(self.gate.top_k)
        weights = values / values.sum(dim=-1, keepdim=True)
        for b in range(len(x_BND)):
            for e in range(experts.num_experts):
                rows, slots = torch.where(chosen[b] == e)
                hidden = experts.act_fn(x_BND[b][rows] @ experts.up_proj[e].T + experts.up_proj_bias[e])
                output = hidden @ experts.down_proj[e].T + experts.down_proj_bias[e]
                results[b][rows] += weights[b, rows, slots, None] * output
        return results


def make_towers(sizes: dict[str, int], spec: UpcycleSpec) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Returns a dense tower, its upcycled form with experts moved apart, and the loop over the same tensors."""
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    torch.manual_seed(0)
    grouped = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    upcycle(grouped, spec)
    with torch.no_grad():
        for _, mlp in upcycled_mlps(grouped):
            mlp.experts.up_proj.add_(torch.randn_like(mlp.experts.up_proj) * 0.01)
    torch.manual_seed(0)
    looped = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    upcycle(looped, spec)
    looped.load_state_dict(grouped.state_dict())
    for path, mlp in upcycled_mlps(looped):
        looped.set_submodule(path, LoopedMLP(mlp))
    return dense, grouped, looped


def step(tower: nn.Module, pixels: Tensor) -> Tensor:
    """Runs one forward and backward pass."""
    tower.zero_grad(set_to_none=True)
    output = tower(pixels)
    # Not its square: the last norm fixes that, and gradients would be nothing but rounding.
    (output * torch.linspace(-1, 1, output.shape[-1])).sum().backward()
    return output.detach()


def largest_difference(grouped: nn.Module, looped: nn.Module, pixels: Tensor) -> float:
    """Returns the largest difference of outputs and gradients, relative to the largest value of each tensor."""
    pairs = [(step(grouped, pixels), step(looped, pixels))]
    others = dict(looped.named_parameters())
    pairs += [(p.grad, others[name].grad) for name, p in grouped.named_parameters()]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def seconds(run: Callable[[], object]) -> float:
    """Returns the wall-clock time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(quick: bool, batch: int, rounds: int, threads: int) -> dict[str, float | int | bool]:
    """Checks that both ways agree, and times them in turns."""
    torch.set_num_threads(threads)
    sizes = SIZES["quick" if quick else "full"]
    towers = dict(zip(("dense", "grouped", "looped"), make_towers(sizes, UpcycleSpec(experts=4, top_k=2)), strict=True))
    pixels = torch.randn(batch, 3, sizes["img_size"], sizes["img_size"], device="cpu")
    difference = largest_difference(towers["grouped"], towers["looped"], pixels)
    times: dict[str, list[float]] = {name: [] for name in towers}
    for _ in range(rounds):
        for name, tower in towers.items():
            times[name].append(seconds(lambda tower=tower: step(tower, pixels)))
    ratios = [slow / fast for slow, fast in zip(times["looped"], times["grouped"], strict=True)]
    return {
        **{f"{name}_ms": round(1000 * statistics.median(values), 2) for name, values in times.items()},
        "looped_over_grouped": round(statistics.median(ratios), 2),
        "largest_difference": difference,
        "same": difference <= TOLERANCE,
        "batch": batch,
        "threads": threads,
        "quick": quick,
    }


def main(argv: list[str]) -> int:
    """Prints the table, writes the JSON; exit code 1 if the two ways disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller tower and three rounds: does it work?")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, help="timed rounds; by default 20, with --quick 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/cumo.json"), help="file to write")
    options = parser.parse_args(argv)
    result = measure(options.quick, options.batch, options.rounds or (3 if options.quick else 20), options.threads)
    for name, value in result.items():
        print(f"{name:<24}{value}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["same"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
