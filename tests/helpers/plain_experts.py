"""What a mixture of gated experts is, as a loop that shares nothing with the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def plain_loop(
    x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, frozen: Sequence[Tensor], new: Sequence[Tensor]
) -> Tensor:
    """Computes the weighted sum of the selected experts, one expert at a time; indices above the last count nothing."""
    gate_up, down = (torch.cat(pair) for pair in zip(frozen, new, strict=True))
    y_TD = torch.zeros_like(x_TD)
    for expert in range(len(down)):
        tokens, slots = (indices_TK == expert).nonzero(as_tuple=True)
        gate, up = (x_TD[tokens] @ gate_up[expert].T).chunk(2, dim=-1)
        out = (F.silu(gate) * up) @ down[expert].T
        y_TD = y_TD.index_add(0, tokens, out * weights_TK[tokens, slots, None])
    return y_TD
