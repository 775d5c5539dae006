"""Frozen weights in 4 bits (NF4, Dettmers et al., QLoRA, arXiv 2305.14314) that stand in for tensors in products.

An `NF4Weight` takes the place of a weight parameter under the parameter's own name, so that the
module around it (a Linear layer, the experts of any family, by any registered implementation)
runs unchanged: torch hands products with it to this file, where the weight is unpacked for the
product, once more for its backward, and never kept in between.

Shapes: L leading dimensions (none for a matrix, E for a stack of experts), K blocks of 64 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401 - registers an operation that is named below
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64
"""Weights that share a scale; with a scale of 32 bits that makes 4.5 bits a weight."""

QUANT_TYPE = "nf4"
# Quantising holds some 20 bytes a weight for a moment, so it goes by pieces.
_PIECE = 2**12
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a matrix, or each matrix of a stack for itself, so that experts do not share a block.

    The work is done on the CPU, whose rounding is the same on every machine: a base has one
    fingerprint, wherever it was loaded.

    Args:
        weight: (L, rows, columns) in 16 or 32 bits; `rows * columns` is a multiple of 64.

    Returns:
        (L, K, 32) bytes of two weights each, and (L, K) scales in fp32.
    """
    from bitsandbytes import functional as bnb

    lead = weight.shape[:-2]
    packed, scales = [], []
    for piece in weight.detach().cpu().reshape(-1, BLOCK).split(_PIECE):
        data, state = bnb.quantize_4bit(piece.contiguous(), blocksize=BLOCK, quant_type=QUANT_TYPE)
        packed.append(data.view(-1, BLOCK // 2))
        scales.append(state.absmax)
    return torch.cat(packed).view(*lead, -1, BLOCK // 2), torch.cat(scales).view(*lead, -1)


def unpack(packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns quantised weights as numbers again.

    Args:
        packed: (..., K, 32) bytes.
        absmax: (..., K) scales.
        shape: Shape of the weights.
        dtype: Their type.
    """
    from bitsandbytes import functional as bnb

    computed = dtype if dtype in _COMPUTED else torch.float32
    blocks = torch.Size((absmax.numel(), BLOCK))
    state = bnb.QuantState(absmax.reshape(-1), blocks, dtype=computed, blocksize=BLOCK, quant_type=QUANT_TYPE)
    # A column: bitsandbytes takes a single row for a transposed weight.
    return bnb.dequantize_4bit(packed.reshape(-1, 1), state).view(tuple(shape)).to(dtype)


class NF4Weight(nn.Module):
    """A frozen 4-bit weight in the place of a parameter.

    Both tensors are frozen parameters and no buffers: no checkpoint holds them, every fingerprint of
    what is frozen covers them, and data-parallel training does not send them at each step.

    Args:
        packed: (L, K, 32) bytes, see `pack`.
        absmax: (L, K) scales.
        shape: Shape of the weight.
        dtype: Type that the weight had; it follows `module.to(dtype)`, the scales stay fp32.
    """

    def __init__(self, packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.shape, self.dtype = torch.Size(shape), dtype

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.packed.device

    @property
    def operand(self) -> Operand:
        """The whole weight, to be multiplied."""
        return Operand(self.packed, self.absmax, self.shape, self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Operand:
        return self.operand[rows]

    def new_empty(self, *size: int) -> Tensor:
        """Returns a tensor without values, of the type and on the device of the weight."""
        return torch.empty(*size, dtype=self.dtype, device=self.device)

    def transpose(self, first: int, second: int) -> Operand:
        """Returns the weight with its last two dimensions exchanged."""
        return self.operand.transpose(first, second)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Weight:
        # `.to(bfloat16)` changes what the weight is unpacked to, and not its scales.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        super()._apply(lambda tensor: fn(tensor.view(torch.uint8)).view(tensor.dtype), recurse)
        return self

    def extra_repr(self) -> str:
        """Returns shape and type for the printed module."""
        return f"{tuple(self.shape)}, {QUANT_TYPE} for {self.dtype}"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Tensor], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        return _dispatch(func, args, kwargs or {})


@dataclass(frozen=True, eq=False)
class Operand:
    """A 4-bit weight, or some matrices of a stack of them, as it goes into a product.

    Attributes:
        packed: Bytes of the whole weight.
        absmax: Scales of the whole weight.
        whole: Shape of the whole weight.
        dtype: Type of the weight that it stands for.
        rows: Index into the first dimension of a stack; None for all of it.
        transposed: Whether the last two dimensions are exchanged.
    """

    packed: Tensor
    absmax: Tensor
    whole: torch.Size
    dtype: torch.dtype
    rows: Tensor | None = None
    transposed: bool = False

    @property
    def shape(self) -> torch.Size:
        """Shape of what is multiplied."""
        lead = self.whole[:-2] if self.rows is None else self.rows.shape
        matrix = self.whole[-2:]
        return torch.Size((*lead, *(reversed(matrix) if self.transposed else matrix)))

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.packed.device

    def __getitem__(self, rows: Any) -> Operand:
        assert self.rows is None, "experts are chosen once"
        assert len(self.whole) == 3, "only a stack has experts to choose from"
        if isinstance(rows, slice):
            packed, absmax = self.packed[rows], self.absmax[rows]
            return replace(self, packed=packed, absmax=absmax, whole=torch.Size((len(packed), *self.whole[1:])))
        return replace(self, rows=torch.as_tensor(rows, device=self.device))

    def transpose(self, first: int, second: int) -> Operand:
        """Returns the operand with its last two dimensions exchanged."""
        dims = len(self.shape)
        assert {first % dims, second % dims} == {dims - 1, dims - 2}, "only the last two dimensions can be exchanged"
        return replace(self, transposed=not self.transposed)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Returns the chosen weights as numbers."""
        packed, absmax = self.packed, self.absmax
        if self.rows is not None:
            packed, absmax = packed[self.rows], absmax[self.rows]
        weight = unpack(packed, absmax, (*absmax.shape[:-1], *self.whole[-2:]), dtype)
        return weight.transpose(-2, -1) if self.transposed else weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Tensor], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        return _dispatch(func, args, kwargs or {})


class _Product(torch.autograd.Function):
    """`x @ weight` that keeps the packed weight for backward, and has no gradient for it or a bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Operand, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight.packed, weight.absmax, weight.rows, offsets)
        ctx.whole, ctx.transposed = weight.whole, weight.transposed
        return _multiply(x, weight.unpacked(x.dtype), offsets, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        packed, absmax, rows, offsets = ctx.saved_tensors
        weight = Operand(packed, absmax, ctx.whole, grad.dtype, rows, not ctx.transposed)
        return _multiply(grad, weight.unpacked(grad.dtype), offsets), None, None, None


def _multiply(x: Tensor, weight: Tensor, offsets: Tensor | None, bias: Tensor | None = None) -> Tensor:
    if offsets is not None:
        return F.grouped_mm(x, weight, offs=offsets)
    # With its bias a Linear layer rounds once, as it does with a weight that is not packed.
    return torch.matmul(x, weight) if bias is None else F.linear(x, weight.transpose(-2, -1), bias)


# bitsandbytes is not to be traced: a compiled model leaves its graph for each of these products.
@torch.compiler.disable
def product(x: Tensor, weight: Operand, offsets: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Multiplies, in the type of the activations or, under autocast, in autocast's.

    Args:
        x: (..., in), or (tokens, in) sorted by expert.
        weight: (in, out), or a stack (E, in, out).
        offsets: (E,) ends of the experts' tokens in `x`; None for a plain or batched product.
        bias: (out,), frozen, for a plain product.

    Returns:
        (..., out).
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    assert bias is None or not bias.requires_grad, "the bias of a packed layer is frozen with it"
    return _Product.apply(x.to(dtype), weight, offsets, None if bias is None else bias.to(dtype))


def _linear(x: Tensor, weight: Operand, bias: Tensor | None = None) -> Tensor:
    return product(x, weight.transpose(-2, -1), bias=bias)


def _matmul(first: Any, second: Any) -> Tensor:
    if isinstance(second, Operand):
        return product(first, second)
    return product(second.transpose(-2, -1), first.transpose(-2, -1)).transpose(-2, -1)


def _reflected_matmul(second: Tensor, first: Operand) -> Tensor:
    return _matmul(first, second)


def _grouped_mm(x: Tensor, weight: Operand, offs: Tensor, bias: None = None, out_dtype: None = None) -> Tensor:
    assert bias is None, "a bias is added by the caller"
    assert out_dtype is None, "the type is that of the activations"
    return product(x, weight, offs)


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__rmatmul__: _reflected_matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    # What `F.grouped_mm` calls.
    torch._grouped_mm: _grouped_mm,
    # What transformers calls instead, under `torch.compile`.
    torch.ops.transformers.grouped_mm_fallback: _grouped_mm,
}


def _dispatch(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func not in _PRODUCTS:
        # torch makes a TypeError of it that names the operation. To unpack and go on would keep the unpacked weight.
        return NotImplemented
    return _PRODUCTS[func](*(arg.operand if isinstance(arg, NF4Weight) else arg for arg in args), **kwargs)


def packed_rows(experts: nn.Module, rows: Sequence[int]) -> dict[str, Tensor]:
    """Returns the packed weights of some experts as numbers.

    Args:
        experts: An experts module.
        rows: Experts to return, each as often as it is named.

    Returns:
        (len(rows), ...) by the name of the weight; empty where nothing is packed.
    """
    packed = ((name, child) for name, child in experts.named_children() if isinstance(child, NF4Weight))
    return {name: weight[list(rows)].unpacked(weight.dtype) for name, weight in packed}
