"""How fast is one extended mixture-of-experts block, forward and backward, and how little does it keep?

    python benchmarks/block.py --json block.json
    python benchmarks/block.py --quick
    python benchmarks/block.py --threads 2 --write

Compares the block of this project (frozen experts, new expert, router row and calibration that learn) with the
same block written as a plain loop from the equations of MoExtend (arXiv 2408.03511, section 2) and with
transformers' block of E + 1 experts that all learn. All compute the same function: the difference of outputs
and of token gradients to the plain loop stands beside each time.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import DTYPES, Row, difference, finish, interleaved, parse, saved_bytes
from single_stack import SingleStack
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from moextend_pl.contracts import ExtensionPlan, LayerGrowth
from moextend_pl.moe import dispatch
from moextend_pl.moe.extension.growth import grow
from moextend_pl.moe.extension.reach import Reach

SOURCE = 1
BASELINE = "plain loop, all learns"
# Columns of docs/speed.md and the cases whose speed stands there.
ON_PAGE = {
    "`moextend`": "extended, moextend",
    "`grouped_mm`": "extended, grouped_mm",
    "single stack": "extended, single stack",
    "plain loop, same frozen base": "plain loop, frozen base",
    "transformers eager, all learns": "transformers eager, all learns",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a block: E experts, K of them for a token, I wide, in a model D wide; T tokens."""

    experts: int
    top_k: int
    inner: int
    width: int = 512
    tokens: int = 1024


COARSE, FINE = Shape(8, 2, 1024), Shape(64, 8, 256)


class PlainLoop(nn.Module):
    """The extended block as the paper's equations say it: one linear layer after another, one expert after another.

    Every expert has weights of its own (slices of a stack that learns would make the backward pass
    quadratic in the number of experts).
    """

    def __init__(self, block: nn.Module, base_learns: bool) -> None:
        super().__init__()
        base, new, router = block.experts.base, block.experts.new, block.gate
        stacks = [torch.cat([getattr(base, name), getattr(new, name)]) for name in ("gate_up_proj", "down_proj")]
        gates, ups = stacks[0].chunk(2, dim=1)
        self.gates, self.ups, self.downs = (
            nn.ParameterList(nn.Parameter(weight.detach().clone()) for weight in stack)
            for stack in (gates, ups, stacks[1])
        )
        self.router = nn.Parameter(router.base.weight.detach().clone())
        self.new_row = nn.Parameter(router.weight.detach().clone())
        self.w1 = nn.Parameter(router.calibration.in_proj.detach().clone())
        self.w2 = nn.Parameter(router.calibration.out_proj.detach().clone())
        self.top_k = router.base.top_k
        if not base_learns:
            for weights in (self.gates, self.ups, self.downs):
                weights[: base.num_experts].requires_grad_(False)
            self.router.requires_grad_(False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Computes `y = sum_k g_k E_k(x)` of section 2.4."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        probs = F.linear(x_TD, torch.cat([self.router, self.new_row])).float().softmax(dim=-1)
        chosen = probs.topk(self.top_k, dim=-1).indices
        calibrated = probs + F.linear(F.gelu(F.linear(probs, self.w1.float())), self.w2.float())
        gates = calibrated.gather(1, chosen)
        gates = (gates / gates.sum(dim=-1, keepdim=True)).to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD)
        for expert, (gate, up, down) in enumerate(zip(self.gates, self.ups, self.downs, strict=True)):
            token, slot = torch.where(chosen == expert)
            if len(token):
                x = x_TD[token]
                out = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
                y_TD = y_TD.index_add(0, token, out * gates[token, slot, None])
        return y_TD.view_as(x_BSD)


def extended_block(
    shape: Shape, dtype: torch.dtype, implementation: str, added: int = 1, device: str = "cpu"
) -> nn.Module:
    """Returns the block of a Mixtral grown by this project, open to all tokens, with weights as after some training."""
    config = MixtralConfig(
        vocab_size=8, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).to(device, dtype).requires_grad_(False)
    dispatch.use(model, implementation)
    reach = Reach()
    if added:
        plan = ExtensionPlan(layers=(LayerGrowth(0, (SOURCE,) * added),), init="copy", routing="open")
        grow(model, plan, reach)
    reach.set(torch.ones(1, dtype=torch.bool, device=device))
    block: nn.Module = model.model.layers[0].mlp.train()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if parameter.requires_grad and "calibration" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)  # a fresh copy would tie with its source
    return block


def stock_block(block: nn.Module, implementation: str) -> nn.Module:
    """Returns transformers' block of E + 1 experts in one stack that learns, with the weights of an extended one."""
    base, new, router = block.experts.base, block.experts.new, block.gate
    config = copy.deepcopy(base.config)
    config.num_local_experts = base.num_experts + 1
    config.num_hidden_layers = 1
    stock = MixtralForCausalLM(config).to(new.down_proj.dtype)
    stock.set_experts_implementation(implementation)
    result: nn.Module = stock.model.layers[0].mlp.train()
    with torch.no_grad():
        result.gate.weight.copy_(torch.cat([router.base.weight, router.weight]))
        for name in ("gate_up_proj", "down_proj"):
            getattr(result.experts, name).copy_(torch.cat([getattr(base, name), getattr(new, name)]))
    return result.to(new.down_proj.device)


def single_stack_block(block: nn.Module) -> nn.Module:
    """Returns an extended block whose experts, old and new, lie in one contiguous stack."""
    result: Any = copy.copy(block)
    result._modules = {"gate": copy.deepcopy(block.gate), "experts": SingleStack(block.experts)}
    return result


def force(block: nn.Module, x_BSD: Tensor, share: float) -> None:
    """Makes a share of the tokens, and no others, choose the new expert, by a direction that its row alone looks at."""
    direction = torch.zeros(x_BSD.shape[-1], device=x_BSD.device)
    direction[0] = 1.0
    with torch.no_grad():
        block.gate.base.weight[:, 0] = 0.0
        block.gate.weight.copy_(8.0 * direction)
        sign = torch.full(x_BSD.shape[:-1], -1.0)
        sign[:, : round(share * x_BSD.shape[1])] = 1.0
        x_BSD[..., 0] = sign.to(x_BSD)


def step_of(block: nn.Module, x_BSD: Tensor, dy_BSD: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Returns one forward and backward pass; it gives the output and the gradient of the tokens."""

    def step() -> tuple[Tensor, Tensor]:
        x = x_BSD.detach().clone().requires_grad_()
        y = block(x)
        y.backward(dy_BSD)
        block.zero_grad(set_to_none=True)
        assert x.grad is not None
        return y.detach(), x.grad

    return step


def compare(shape: Shape, dtype: str, share: float | None, options: argparse.Namespace) -> list[Row]:
    """Times all cases of one size.

    Args:
        shape: Sizes.
        dtype: `fp32` or `bf16`.
        share: Share of the tokens that choose the new expert; None leaves it to a random router.
        options: As read by `parse`.

    Returns:
        A row for each case; `speed` is relative to the plain loop that learns everything.
    """
    ours = extended_block(shape, DTYPES[dtype], dispatch.FROZEN_EXPERTS, device=options.device)
    generator = torch.Generator("cpu").manual_seed(1)
    size = (1, shape.tokens, shape.width)
    drawn = (torch.randn(size, generator=generator, device="cpu") for _ in range(2))
    x, dy = (one.to(options.device, DTYPES[dtype]) for one in drawn)
    if share is not None:
        force(ours, x, share)
    grouped = extended_block(shape, DTYPES[dtype], "grouped_mm", device=options.device)
    grouped.load_state_dict(ours.state_dict())
    blocks = {
        BASELINE: PlainLoop(ours, base_learns=True),
        "plain loop, frozen base": PlainLoop(ours, base_learns=False),
        "transformers grouped_mm, all learns": stock_block(ours, "grouped_mm"),
        "extended, grouped_mm": grouped,
        "extended, moextend": ours,
    }
    if share is None:
        blocks["transformers eager, all learns"] = stock_block(ours, "eager")
    blocks["extended, single stack"] = single_stack_block(ours)
    steps = {name: step_of(block, x, dy) for name, block in blocks.items()}
    results = {name: step() for name, step in steps.items()}
    kept = {
        name: saved_bytes(lambda block=block: block(x.detach().clone().requires_grad_()), block.parameters())
        for name, block in blocks.items()
    }
    times = interleaved(steps, options)
    return [
        {
            "E": shape.experts, "k": shape.top_k, "T": shape.tokens, "dtype": dtype,
            "new": "natural" if share is None else share, "case": name, **times[name],
            "speed": round(times[BASELINE]["median_ms"] / times[name]["median_ms"], 3),
            "kept_MB": round(kept[name] / 2**20, 3),
            "kept": round(kept[name] / kept["transformers grouped_mm, all learns"], 3),
            "y_diff": difference(results[name][0], results[BASELINE][0]),
            "dx_diff": difference(results[name][1], results[BASELINE][1]),
        }
        for name in blocks
    ]  # fmt: skip


def page_rows(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of the page: one for each size with a random router, its cases beside each other."""
    by_size: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["new"] == "natural":
            by_size.setdefault((row["E"], row["k"], row["dtype"], row["T"]), {})[row["case"]] = row
    found: dict[str, list[Row]] = {}
    for (experts, top_k, dtype, tokens), cases in by_size.items():
        block = f"{experts} experts, top {top_k}"
        rows_of_block = found.setdefault(block, [])
        rows_of_block.append({
            "block": "" if rows_of_block else block, "tokens": tokens, "type": dtype,
            **{title: f"{cases[case]['speed']:.2f}x" for title, case in ON_PAGE.items()},
            "kept for backward against transformers": f"{cases['extended, moextend']['kept']:.2f}",
        })  # fmt: skip
    return [row for rows_of_block in found.values() for row in rows_of_block]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one table and returns the exit code."""
    options = parse(__doc__.splitlines()[0], argv, on_page=True)
    # Few large experts and many small ones; the largest numbers of tokens with more shares of the new expert.
    grid, shares = [(COARSE, (32, 512, 2048)), (FINE, (32, 1024))], (None, 0.0, 0.1, 0.5)
    if options.quick:
        small = Shape(4, 2, 64, width=32), Shape(16, 4, 32, width=32)
        grid, shares = [(shape, (32, 128)) for shape in small], (None, 0.1)
    rows: list[Row] = []
    for dtype in options.dtype:
        for shape, tokens in grid:
            for count in tokens:
                sized = Shape(shape.experts, shape.top_k, shape.inner, shape.width, count)
                for share in shares if count == tokens[-1] and shape is grid[0][0] else shares[:1]:
                    rows += compare(sized, dtype, share, options)
    return finish(__doc__.splitlines()[0], {"one block, forward and backward": rows}, options, page_rows(rows))


if __name__ == "__main__":
    sys.exit(main())
