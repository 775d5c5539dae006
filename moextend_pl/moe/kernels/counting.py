"""Sorts slots by expert by counting, as Triton kernels: equal ones keep their order, whatever runs first.

Three steps: each block of slots counts its experts; one program adds the counts up and lays out the tiles; each block
puts its slots in their places. Slots of nobody count as those of expert M, and stand last.

Shapes: S slots, M experts, B blocks of slots, R tiles.
"""

# mypy: ignore-errors
# The decorator hides types, and pointers have none.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _experts(indices_S, slot, S, M):
    """Reads the experts of slots; what names nobody is M."""
    return tl.minimum(tl.load(indices_S + slot, mask=slot < S, other=M), M).to(tl.int32)


@triton.jit
def count(indices_S, counts_BM, S, M, SLOTS: tl.constexpr, STEP: tl.constexpr):
    """Counts the slots of each expert, and of nobody, in one block."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    expert = tl.where(slot < S, _experts(indices_S, slot, S, M), M + 1)
    for start in range(0, M + 1, STEP):
        m = start + tl.arange(0, STEP)
        found = tl.sum((expert[:, None] == m[None, :]).to(tl.int32), axis=0)
        tl.store(counts_BM + tl.program_id(0) * (M + 1) + m, found, mask=m <= M)


@triton.jit
def lay_out(
    counts_BM, end_M, tile_expert, tile_row, blocks, tiles, M,
    EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Finds where each expert's slots end and what a tile holds; puts in place of a count where its slots begin."""
    m, b = tl.arange(0, EXPERTS), tl.arange(0, BLOCKS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, blocks, BLOCKS):
        inside = (start + b < blocks)[:, None] & (m <= M)[None, :]
        total += tl.sum(tl.load(counts_BM + (start + b)[:, None] * (M + 1) + m[None, :], mask=inside, other=0), axis=0)
    end = tl.cumsum(total, axis=0)
    tl.store(end_M + m, end, mask=m < M)
    before = end - total
    for start in range(0, blocks, BLOCKS):
        inside = (start + b < blocks)[:, None] & (m <= M)[None, :]
        at = counts_BM + (start + b)[:, None] * (M + 1) + m[None, :]
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, before[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        before += tl.sum(counts, axis=0)
    own = (total + (ROWS - 1)) // ROWS
    until = tl.cumsum(own, axis=0)
    origin = end - total - (until - own) * ROWS
    for start in range(0, tiles, BLOCKS):
        tile = start + b
        behind = (until[None, :] <= tile[:, None]) & (m < M)[None, :]
        expert = tl.sum(behind.to(tl.int32), axis=1)
        row = tile * ROWS + tl.sum(tl.where(m[None, :] == expert[:, None], origin[None, :], 0), axis=1)
        tl.store(tile_expert + tile, expert, mask=tile < tiles)
        tl.store(tile_row + tile, row, mask=tile < tiles)


@triton.jit
def place(indices_S, first_BM, slots_S, slot_S, S, M, SLOTS: tl.constexpr):
    """Writes the sorted place of each slot of one block, and at each place its slot."""
    offset = tl.arange(0, SLOTS)
    block = tl.program_id(0)
    slot = block * SLOTS + offset
    there = slot < S
    expert = _experts(indices_S, slot, S, M)
    equal = (expert[None, :] == expert[:, None]) & (offset[None, :] < offset[:, None])
    sorted_ = tl.load(first_BM + block * (M + 1) + expert, mask=there, other=0) + tl.sum(equal.to(tl.int32), axis=1)
    tl.store(slots_S + slot, sorted_, mask=there)
    tl.store(slot_S + sorted_, slot, mask=there)


def sort_slots(indices_TK: Tensor, order: tuple[Tensor, ...], rows: int) -> None:
    """Fills the tensors of an `Order`, whose tiles hold so many rows."""
    slots_TK, slot_S, end_M, expert_R, row_R = order
    S, M, slots, experts = indices_TK.numel(), len(end_M), 256, triton.next_power_of_2(len(end_M) + 1)
    blocks = triton.cdiv(S, slots)
    counts_BM = end_M.new_empty(blocks, M + 1)
    count[(blocks,)](indices_TK, counts_BM, S, M, SLOTS=slots, STEP=min(experts, 32), num_warps=4)
    lay_out[(1,)](
        counts_BM, end_M, expert_R, row_R, blocks, len(expert_R), M,
        EXPERTS=experts, BLOCKS=max(8192 // experts, 8), ROWS=rows, num_warps=8,
    )  # fmt: skip
    place[(blocks,)](indices_TK, counts_BM, slots_TK, slot_S, S, M, SLOTS=slots, num_warps=8)
