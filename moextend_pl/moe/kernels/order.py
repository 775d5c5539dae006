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
        slot_S: Slot at each sorted place; its token is this through K.
        end_M: Where each expert's slots end.
        expert_R: Expert of each tile.
        row_R: First sorted slot of each tile.
    """

    slots_TK: Tensor
    slot_S: Tensor
    end_M: Tensor
    expert_R: Tensor
    row_R: Tensor


def order_slots(indices_TK: Tensor, experts: int) -> Order:
    """Sorts the slots of a pass by expert, with no value read by the host.

    Args:
        indices_TK: Selected experts; M and above are nobody's.
        experts: M.
    """
    return Order(*_order(indices_TK.contiguous(), experts))


@torch.library.custom_op("moextend::order_slots", mutates_args=())
def _order(indices_TK: Tensor, experts: int) -> list[Tensor]:
    from moextend_pl.moe.kernels.counting import sort_slots

    order = _empty(indices_TK, experts)
    sort_slots(indices_TK, order, ROWS)
    return list(order)


@_order.register_fake
def _(indices_TK: Tensor, experts: int) -> list[Tensor]:
    return list(_empty(indices_TK, experts))


def _empty(indices_TK: Tensor, experts: int) -> Order:
    slots, tiles = indices_TK.numel(), tile_count(indices_TK.numel(), experts)
    new = lambda *shape: indices_TK.new_empty(shape, dtype=torch.int32)  # noqa: E731
    return Order(new(*indices_TK.shape), new(slots), new(experts), new(tiles), new(tiles))


def tile_count(slots: int, experts: int) -> int:
    """Returns how many tiles hold any distribution of the slots."""
    return slots // ROWS + min(experts, slots)
