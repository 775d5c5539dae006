"""Grouped products that read rows where they lie, with activation and its gradient inside, as Triton kernels.

A slot is a token that chose an expert; slots are sorted by expert, and a tile is some slots of one expert. Every
row adds up in the same order whatever tile it lies in, so that a token's result depends on no other.
Two stacks of experts are read by one kernel: the frozen ones [0, E) and the new ones from E on.

Shapes: S sorted slots, D width, I width of the activation, E frozen experts, M experts in all.
"""

# mypy: ignore-errors
# The decorator hides types, and pointers have none.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(tiles, columns, BAND: tl.constexpr):
    """Returns a program's tile of rows and of columns, so that neighbours share rows and weights in the cache."""
    program = tl.program_id(0)
    band = program // (BAND * columns)
    height = min(tiles - band * BAND, BAND)
    inside = program % (BAND * columns)
    return band * BAND + inside % height, inside // height


@triton.jit
def _stack(frozen, new, expert, E, size):
    """Returns where the weights of an expert begin."""
    expert = expert.to(tl.int64)
    return tl.where(expert < E, frozen + expert * size, new + (expert - E) * size)


@triton.jit
def _load(at, mask, EVEN: tl.constexpr):
    """Reads a tile; a mask would keep an even one from being fetched ahead in wide pieces."""
    return tl.load(at) if EVEN else tl.load(at, mask=mask, other=0.0)


@triton.jit
def gate_up(
    x_TD, frozen, new, tile_expert, tile_row, expert_end, slot_S, projected_SH, activated_SI,
    tiles, D, I, E, M,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Writes gate and up of each slot side by side, and `silu(gate) * up`."""
    tile, column = _tile(tiles, tl.cdiv(I, COLUMNS), BAND)
    expert = tl.load(tile_expert + tile)
    if expert >= M:
        return
    row = tl.load(tile_row + tile) + tl.arange(0, ROWS)
    live = row < tl.load(expert_end + expert)
    token = (tl.load(slot_S + row, mask=live, other=0) // TOP_K).to(tl.int64)
    c = column * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < I
    k = tl.arange(0, DEPTH)
    w = _stack(frozen, new, expert, E, 2 * I * D)
    x = x_TD + token[:, None] * D + k[None, :]
    w_gate = w + c[None, :] * D + k[:, None]
    w_up = w_gate + I * D
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        more = start + k < D
        in_w = more[:, None] & inside[None, :]
        a = _load(x, more[None, :], EVEN)
        gate = tl.dot(a, _load(w_gate, in_w, EVEN), gate, input_precision="ieee")
        up = tl.dot(a, _load(w_up, in_w, EVEN), up, input_precision="ieee")
        x += DEPTH
        w_gate += DEPTH
        w_up += DEPTH
    kind = projected_SH.dtype.element_ty
    gate, up = gate.to(kind), up.to(kind)
    g = gate.to(tl.float32)
    activated = (g * tl.sigmoid(g)).to(kind) * up
    row64 = row.to(tl.int64)[:, None]
    write = live[:, None] & inside[None, :]
    tl.store(projected_SH + row64 * 2 * I + c[None, :], gate, mask=write)
    tl.store(projected_SH + row64 * 2 * I + I + c[None, :], up, mask=write)
    tl.store(activated_SI + row64 * I + c[None, :], activated, mask=write)


@triton.jit
def product(
    a, frozen, new, tile_expert, tile_row, expert_end, slot_S, out_SN,
    tiles, K, N, E, M, stride_k, stride_n,
    GATHER: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Multiplies each slot's row, or where GATHER its token's, by its expert's matrix (K, N) of any strides."""
    tile, column = _tile(tiles, tl.cdiv(N, COLUMNS), BAND)
    expert = tl.load(tile_expert + tile)
    if expert >= M:
        return
    row = tl.load(tile_row + tile) + tl.arange(0, ROWS)
    live = row < tl.load(expert_end + expert)
    read = (tl.load(slot_S + row, mask=live, other=0) // TOP_K if GATHER else tl.where(live, row, 0)).to(tl.int64)
    c = column * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < N
    k = tl.arange(0, DEPTH)
    a += read[:, None] * K + k[None, :]
    w = _stack(frozen, new, expert, E, K * N)
    w += c[None, :] * stride_n + k[:, None] * stride_k
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        more = start + k < K
        left = _load(a, more[None, :], EVEN)
        right = _load(w, more[:, None] & inside[None, :], EVEN)
        out = tl.dot(left, right, out, input_precision="ieee")
        a += DEPTH
        w += DEPTH * stride_k
    write = live[:, None] & inside[None, :]
    tl.store(out_SN + row.to(tl.int64)[:, None] * N + c[None, :], out.to(out_SN.dtype.element_ty), mask=write)


@triton.jit
def activation_gradient(
    d_SI, projected_SH, weights_TK, slot_S, expert_end, dprojected_SH, dweights_TK, new_activated_UI, I, E, M,
    KEEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Takes a slot's gradient of the activation back through `silu(gate) * up`, one slot a program.

    Also writes the gradient of its routing weight, `<activation, d>`, and where KEEP, for slots of new experts alone,
    the weighted activation that the gradient of their `down` needs.
    """
    slot = tl.program_id(0).to(tl.int64)
    own = tl.load(slot_S + slot)
    if slot >= tl.load(expert_end + M - 1):
        tl.store(dweights_TK + own, 0.0)
        return
    weight = tl.load(weights_TK + own).to(tl.float32)
    first_new = tl.load(expert_end + E - 1)
    kind = dprojected_SH.dtype.element_ty
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, I, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        inside = c < I
        at = slot * 2 * I + c
        gate = tl.load(projected_SH + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(projected_SH + at + I, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_SI + slot * I + c, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        total += silu * up * d
        d *= weight
        tl.store(dprojected_SH + at, (d * up * (share + silu * (1 - share))).to(kind), mask=inside)
        tl.store(dprojected_SH + at + I, (d * silu).to(kind), mask=inside)
        if KEEP and slot >= first_new:
            tl.store(new_activated_UI + (slot - first_new) * I + c, (silu * up * weight).to(kind), mask=inside)
    tl.store(dweights_TK + own, tl.sum(total, axis=0).to(dweights_TK.dtype.element_ty))


@triton.jit
def weight_gradient(
    left, right, slot_S, expert_end, out_NAB, A, B, E,
    LEFT: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Adds up `left^T right` (A, B) over the slots of each new expert, in the order of the slots.

    Where LEFT, the left side is read by token and the right side begins at the first slot of the new experts; else the
    left side is read by slot and the right one by token.
    """
    expert = tl.program_id(1) + E
    begin, end = tl.load(expert_end + expert - 1), tl.load(expert_end + expert)
    origin = tl.load(expert_end + E - 1)
    columns = tl.cdiv(B, COLUMNS)
    a = (tl.program_id(0) // columns) * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) % columns) * COLUMNS + tl.arange(0, COLUMNS)
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(begin, end, DEPTH):
        slot = start + tl.arange(0, DEPTH)
        live = slot < end
        token = (tl.load(slot_S + slot, mask=live, other=0) // TOP_K).to(tl.int64)
        if LEFT:
            at_left, at_right = token, (slot - origin).to(tl.int64)
        else:
            at_left, at_right = slot.to(tl.int64), token
        in_left = live[None, :] & (a < A)[:, None]
        in_right = live[:, None] & (b < B)[None, :]
        one = tl.load(left + at_left[None, :] * A + a[:, None], mask=in_left, other=0.0)
        other = tl.load(right + at_right[:, None] * B + b[None, :], mask=in_right, other=0.0)
        out = tl.dot(one, other, out, input_precision="ieee")
    place = (tl.program_id(1).to(tl.int64) * A + a[:, None]) * B + b[None, :]
    tl.store(out_NAB + place, out.to(out_NAB.dtype.element_ty), mask=(a < A)[:, None] & (b < B)[None, :])


@triton.jit
def sum_slots(
    rows_SD, slots_TK, weights_TK, expert_end, out_TD, T, D, M,
    K: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up the rows of each token's slots in fp32, weighted or not; slots behind the last expert count nothing."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there, inside = t < T, c < D
    total = tl.load(expert_end + M - 1)
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slots_TK + t * K + k, mask=there, other=0).to(tl.int64)
        read = (there & (slot < total))[:, None] & inside[None, :]
        rows = tl.load(rows_SD + slot[:, None] * D + c[None, :], mask=read, other=0.0).to(tl.float32)
        if WEIGHTED:
            rows *= tl.load(weights_TK + t * K + k, mask=there, other=0.0).to(tl.float32)[:, None]
        out += rows
    place = t.to(tl.int64)[:, None] * D + c[None, :]
    tl.store(out_TD + place, out.to(out_TD.dtype.element_ty), mask=there[:, None] & inside[None, :])
