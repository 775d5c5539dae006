"""Starts the kernels: shapes of tiles, empty outputs, grids. Tiles follow from the shapes of the weights alone.

Nothing is tuned while it runs: one choice of tiles makes one order of sums, so that a resumed run, and a model with
and without new experts, give the same bits. Shapes as in `gated_experts`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from moextend_pl.moe.kernels import choice, products
from moextend_pl.moe.kernels.order import ROWS, Order

# Of the tiles tried on an H100 in bf16, see docs/speed.md.
PAIR: dict[str, Any] = {"COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 4}
SINGLE: dict[str, Any] = {"COLUMNS": 256, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
GRADIENT: dict[str, Any] = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
BAND = 16
"""Tiles of rows that share the weights in the cache."""


def _tiles(dtype: torch.dtype, shape: dict[str, Any]) -> dict[str, Any]:
    # A tile of 32-bit numbers has to fit the same memory.
    return shape if dtype.itemsize <= 2 else {**shape, "COLUMNS": 64, "DEPTH": 32, "num_stages": 2}


def _even(depth: int, columns: int, shape: dict[str, Any]) -> bool:
    return depth % shape["DEPTH"] == 0 and columns % shape["COLUMNS"] == 0


def _grid(order: Order, columns: int, tile: int) -> tuple[int]:
    return (len(order.expert_R) * triton.cdiv(columns, tile),)  # no token, no program


def gate_up(x_TD: Tensor, frozen: Tensor, new: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Returns gate and up of each slot (S, H), and the activation (S, I)."""
    S, D, I = len(order.slot_S), x_TD.shape[1], frozen.shape[1] // 2  # noqa: E741
    projected_SH, activated_SI = x_TD.new_empty(S, 2 * I), x_TD.new_empty(S, I)
    shape = _tiles(x_TD.dtype, PAIR)
    products.gate_up[_grid(order, I, shape["COLUMNS"])](
        x_TD, frozen, new, order.expert_R, order.row_R, order.end_M, order.slot_S, projected_SH, activated_SI,
        len(order.expert_R), D, I, len(frozen), len(order.end_M),
        TOP_K=order.slots_TK.shape[1], ROWS=ROWS, BAND=BAND, EVEN=_even(D, I, shape), **shape,
    )  # fmt: skip
    return projected_SH, activated_SI


def product(a: Tensor, frozen: Tensor, new: Tensor, order: Order, *, transposed: bool, gather: bool = False) -> Tensor:
    """Returns each slot's row, or where `gather` its token's, times its expert's matrix, or the matrix transposed."""
    N, K = (frozen.shape[1], frozen.shape[2]) if transposed else (frozen.shape[2], frozen.shape[1])
    stride_k, stride_n = (1, K) if transposed else (N, 1)
    out_SN = a.new_empty(len(order.slot_S), N)
    shape = _tiles(a.dtype, SINGLE)
    products.product[_grid(order, N, shape["COLUMNS"])](
        a, frozen, new, order.expert_R, order.row_R, order.end_M, order.slot_S, out_SN,
        len(order.expert_R), K, N, len(frozen), len(order.end_M), stride_k, stride_n,
        GATHER=gather, TOP_K=order.slots_TK.shape[1],
        ROWS=ROWS, BAND=BAND, EVEN=_even(K, N, shape), **shape,
    )  # fmt: skip
    return out_SN


def activation_gradient(
    d_SI: Tensor, projected_SH: Tensor, weights_TK: Tensor, order: Order, E: int, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of projection (S, H) and weights (T, K), and the activations of new experts (room, I)."""
    S, I = d_SI.shape  # noqa: E741
    dprojected_SH, new_activated_UI = torch.empty_like(projected_SH), d_SI.new_empty(room, I)
    dweights_TK = torch.empty_like(weights_TK)
    products.activation_gradient[(S,)](
        d_SI, projected_SH, weights_TK, order.slot_S, order.end_M, dprojected_SH, dweights_TK, new_activated_UI,
        I, E, len(order.end_M), KEEP=room > 0, COLUMNS=min(triton.next_power_of_2(I), 2048), num_warps=4,
    )  # fmt: skip
    return dprojected_SH, dweights_TK, new_activated_UI


def weight_gradient(left: Tensor, right: Tensor, order: Order, like: Tensor, E: int, *, gathered: str) -> Tensor:
    """Returns `left^T right` over the slots of each new expert; one side is read by token.

    Args:
        left: (S, A) by slot, or (T, A) by token where `gathered` is `left`.
        right: (T, B) by token, or (room, B) by slot of new experts.
        order: Order of the slots.
        like: New experts' weights (N, A, B).
        E: Number of frozen experts.
        gathered: `left` or `right`.
    """
    out_NAB = torch.empty_like(like)
    A, B = like.shape[1:]
    shape = _tiles(left.dtype, GRADIENT)
    grid = (triton.cdiv(A, shape["ROWS"]) * triton.cdiv(B, shape["COLUMNS"]), len(like))
    products.weight_gradient[grid](
        left, right, order.slot_S, order.end_M, out_NAB, A, B, E,
        LEFT=gathered == "left", TOP_K=order.slots_TK.shape[1], **shape,
    )  # fmt: skip
    return out_NAB


def sum_slots(rows_SD: Tensor, weights_TK: Tensor | None, order: Order) -> Tensor:
    """Returns the sum of each token's slots (T, D), weighted or not."""
    (T, K), D = order.slots_TK.shape, rows_SD.shape[1]
    out_TD = rows_SD.new_empty(T, D)
    rows, columns = 4, min(triton.next_power_of_2(D), 1024)
    products.sum_slots[(triton.cdiv(T, rows), triton.cdiv(D, columns))](
        rows_SD, order.slots_TK, rows_SD if weights_TK is None else weights_TK, order.end_M, out_TD,
        T, D, len(order.end_M), K=K, WEIGHTED=weights_TK is not None, ROWS=rows, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    return out_TD


def _routing_shape(experts: int) -> dict[str, Any]:
    # Of one shape for each number of experts, small enough for the memory of any card.
    width = max(triton.next_power_of_2(experts), 16)
    return {"ROWS": 32 if width <= 64 else 16, "EXPERTS": width, "UNITS": 16, "num_warps": 8, "num_stages": 1}


def choose(
    logits_TM: Tensor, open_T: Tensor, base: tuple[Tensor, Tensor], sources_N: Tensor,
    calibration: list[Tensor], out: tuple[Tensor, Tensor], how: tuple[Any, ...],
) -> None:  # fmt: skip
    """Fills weights and indices of `calibrated_routing`."""
    (T, M), K, (form, families, normalised, scale) = logits_TM.shape, out[0].shape[1], how
    shape = _routing_shape(M)
    choice.choose[(triton.cdiv(T, shape["ROWS"]),)](
        logits_TM, open_T, *base, sources_N, *calibration, *out, T, M, M - len(sources_N), len(calibration[0]), scale,
        K=K, SELECTED=triton.next_power_of_2(K), NEW=len(sources_N), FAMILIES=bool(families), FORM=form,
        NORMALISED=bool(normalised), **shape,
    )  # fmt: skip


def choose_gradient(
    dweights_TK: Tensor, logits_TM: Tensor, open_T: Tensor, indices_TK: Tensor, sources_N: Tensor,
    calibration: list[Tensor], how: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of logits and of both matrices of the calibration, sums over programs in their order."""
    (T, M), C, (form, families, normalised, scale) = logits_TM.shape, len(calibration[0]), how
    shape = _routing_shape(M)
    programs = triton.cdiv(T, shape["ROWS"])
    dlogits_TM = torch.empty_like(logits_TM)
    shares = [torch.empty(programs, *one.shape, dtype=torch.float32, device=one.device) for one in calibration]
    choice.choose_gradient[(programs,)](
        dweights_TK, logits_TM, open_T, indices_TK, sources_N, *calibration, dlogits_TM, *shares,
        T, M, M - len(sources_N), C, scale,
        K=indices_TK.shape[1], NEW=len(sources_N), FAMILIES=bool(families), FORM=form,
        NORMALISED=bool(normalised), **shape,
    )  # fmt: skip
    first, second = (share.sum(0).to(one.dtype) for share, one in zip(shares, calibration, strict=True))
    return dlogits_TM, first, second
