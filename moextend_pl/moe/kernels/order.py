"""Sorts the slots of a pass by expert and cuts them into tiles, with no value read by the host.

Shapes: T tokens, K selected per token, S = T * K sorted slots, M experts in all, R tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 128
"""Slots of a tile."""


class Order(NamedTuple):
    """Slots sorted by expert, cut into tiles; a tile behind the last names expert M.

    Attributes:
        slots_TK: Sorted place of each slot.
        token_S: Token of each sorted slot.
        end_M: Where each expert's slots end.
        expert_R: Expert of each tile.
        row_R: First sorted slot of each tile.
    """

    slots_TK: Tensor
    token_S: Tensor
    end_M: Tensor
    expert_R: Tensor
    row_R: Tensor


def order_slots(indices_TK: Tensor, experts: int) -> Order:
    """Sorts the slots of a pass by expert, with no value read by the host.

    Args:
        indices_TK: Selected experts; M and above are nobody's.
        experts: M.
    """
    device, slots = indices_TK.device, indices_TK.numel()
    # 16 bits sort in half of the passes; whatever names nobody has to fit them.
    sorted_S, slot_S = torch.sort(indices_TK.reshape(-1).clamp(max=experts).to(torch.int16), stable=True)
    place_S = torch.arange(slots, device=device, dtype=torch.int32)
    slots_TK = torch.empty_like(place_S).scatter_(0, slot_S, place_S).view_as(indices_TK)
    numbers_M = torch.arange(experts, device=device, dtype=torch.int16)
    end_M = torch.searchsorted(sorted_S, numbers_M, right=True, out_int32=True)
    start_M = torch.searchsorted(sorted_S, numbers_M, out_int32=True)
    tiles_M = (end_M - start_M + (ROWS - 1)) // ROWS
    until_M = tiles_M.cumsum(0, dtype=torch.int32)
    tile_R = torch.arange(tile_count(slots, experts), device=device, dtype=torch.int32)
    expert_R = torch.searchsorted(until_M, tile_R, right=True, out_int32=True)
    known_R = expert_R.clamp(max=experts - 1)
    first_M = torch.add(start_M, until_M - tiles_M, alpha=-ROWS)
    row_R = torch.add(first_M[known_R], tile_R, alpha=ROWS)
    token_S = torch.div(slot_S, indices_TK.shape[1], rounding_mode="floor").to(torch.int32)
    return Order(slots_TK, token_S, end_M, expert_R, row_R)


def tile_count(slots: int, experts: int) -> int:
    """Returns how many tiles hold any distribution of the slots."""
    return slots // ROWS + min(experts, slots)
