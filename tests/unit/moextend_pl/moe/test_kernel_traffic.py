"""The bytes that the kernels of an extended block move: counted load by load, and near those that none can avoid."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interpreted import answer, interpreted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
BENCHMARKS = str(Path(__file__).parents[4] / "benchmarks")
# Tokens, width, inner width, frozen experts, selected: proportions of OLMoE and Mixtral, and no tiles' multiples.
SCALED = {"olmoe": (64, 128, 64, 8, 8), "mixtral": (96, 64, 224, 8, 2), "odd": (61, 72, 40, 5, 3)}


class Bytes(TorchDispatchMode):
    """Counts what the operations of torch between the kernels take and give."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and looks into those that start kernels."""
        if func.namespace == "moextend":
            from moextend_pl.moe.kernels import gated_experts, order

            wholes = (order._order, gated_experts._forward, gated_experts._backward)
            (whole,) = (one for one in wholes if one._opoverload is func)
            with self:
                return whole._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if not any(name in str(func) for name in ("empty", "view", "detach", "alias", "slice")):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.total += sum(one.nbytes for one in tensors)
        return out


def scaled(name: str) -> tuple[Any, list[Any], int]:
    """Returns a scaled block, its kernels as they ran, and the bytes of everything that is no 16-bit tensor."""
    from helpers.counted_kernels import counted

    sys.path.insert(0, BENCHMARKS)
    from traffic import Block

    from moextend_pl.moe.kernels.gated_experts import gated_experts

    torch.manual_seed(0)
    T, D, I, E, K = SCALED[name]  # noqa: E741
    indices = torch.rand(T, E + 1).topk(K).indices
    weights = torch.rand(T, K).bfloat16().requires_grad_()
    x = torch.randn(T, D).bfloat16().requires_grad_()
    frozen = torch.randn(E, 2 * I, D).bfloat16(), torch.randn(E, D, I).bfloat16()
    new = tuple(stack[:1].clone().requires_grad_() for stack in frozen)
    dy = torch.randn(T, D).bfloat16()
    with counted() as launches, Bytes() as between:
        torch.autograd.grad(gated_experts(x, indices, weights, frozen, new), (x, weights, *new), dy)
    slots_M = tuple(torch.bincount(indices.flatten(), minlength=E + 1).tolist())
    return Block(T, D, I, K, slots_M, 1), launches, between.total + sum(one.rest for one in launches)


def counts() -> dict[str, Any]:
    """Returns for each block the formulas' bytes and the counted ones, kernel by kernel."""
    found = {}
    for name in SCALED:
        block, launches, rest = scaled(name)
        from traffic import SLOT, kernels

        formulas = [[name.split()[0], one.read, one.written, one.asked] for name, one in kernels(block).items()]
        measured = [[one.kernel, one.read, one.written, one.asked] for one in launches if one.read]
        found[name] = {"formulas": formulas, "measured": measured, "rest": rest / block.slots, "granted": SLOT}
    return found


@pytest.mark.slow
def test_each_kernel_moves_what_the_formula_says(tmp_path: Path) -> None:
    found = interpreted(__file__, "counts", tmp_path)
    assert set(found) == set(SCALED)
    for name, case in found.items():
        assert [line[0] for line in case["measured"]] == [line[0] for line in case["formulas"]]
        for measured, formula in zip(case["measured"], case["formulas"], strict=True):
            assert measured == formula, name
        assert case["rest"] < case["granted"]


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("traffic")


@pytest.mark.parametrize("shape", ["olmoe", "mixtral", "qwen3"])
def test_a_real_block_moves_little_more_than_it_must(traffic: Any, shape: str) -> None:
    block = traffic.real_block(shape)
    least, total = traffic.unavoidable(block), traffic.moved(block)
    assert total <= 1.3 * least["fixed order"]
    assert least["each tensor once"] < least["two products"] < least["fixed order"] < total


def test_the_table_has_a_row_for_each_shape(traffic: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert traffic.main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["olmoe", "mixtral", "qwen3"]


if __name__ == "__main__":
    answer(globals())
