"""Every kernel compiles for the cards that train, as it is started for a block of a real model; no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
# Bytes of shared memory that one program may have: on an A100, an H100, and cards for graphics.
MOST, LEAST = {80: 163 * 1024, 90: 227 * 1024}, 99 * 1024


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, list[Any], dict[str, Any]]]]:
    """Collects kernels that would be started, with their arguments."""
    found: list[tuple[Any, list[Any], dict[str, Any]]] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append((self, list(arguments), named))

    monkeypatch.setattr(triton.JITFunction, "run", run)
    return found


def compiled(kernel: Any, arguments: list[Any], named: dict[str, Any], capability: int) -> Any:
    """Compiles a kernel for a card as its start would: addresses and numbers that 16 divides are told so."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, arguments, strict=False)) | {
        name: value for name, value in named.items() if name in kernel.arg_names
    }
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in fixed:
            signature[name] = "constexpr"
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and name not in fixed and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(name),): values[name] for name in fixed}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def start_everything(T: int, D: int, I: int, E: int, K: int) -> None:  # noqa: E741
    """Starts every kernel of a training step of an extended block."""
    from moextend_pl.moe.kernels.calibrated_routing import _choose, _choose_backward
    from moextend_pl.moe.kernels.gated_experts import _backward, _forward
    from moextend_pl.moe.kernels.order import _order

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    M, fp32, int64 = E + 1, torch.float32, torch.int64
    stacks = [[empty(n, 2 * I, D), empty(n, D, I)] for n in (E, 1)]
    x, weights, indices, logits = empty(T, D), empty(T, K), empty(T, K, dtype=int64), empty(T, M)
    order = _order._init_fn(indices, M)
    _, projected = _forward._init_fn(x, weights, *stacks, order)
    _backward._init_fn(x, x, weights, projected, *stacks, order, True)
    open_T, sources = empty(T, dtype=torch.bool), empty(1, dtype=int64)
    how = [empty(2 * E, M, dtype=fp32), empty(M, 2 * E, dtype=fp32)], [1, 1, 1], 1.0
    _choose._init_fn(logits, open_T, weights, indices, sources, *how)
    _choose_backward._init_fn(weights, logits, open_T, indices, sources, *how)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_and_fit_the_card(started: Any, tmp_path: Any, monkeypatch: Any, capability: int) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    start_everything(T=4096, D=4096, I=14336, E=8, K=2)
    names = [kernel.fn.__name__ for kernel, *_ in started]
    assert names == [
        "count", "lay_out", "place", "gate_up", "product", "sum_slots", "product", "activation_gradient", "product",
        "sum_slots", "weight_gradient", "weight_gradient", "choose", "choose_gradient",
    ]  # fmt: skip
    for name, (kernel, arguments, named) in zip(names, started, strict=True):
        shared = compiled(kernel, arguments, named, capability).metadata.shared
        assert shared <= (MOST[capability] if name in ("gate_up", "product", "weight_gradient") else LEAST), name
