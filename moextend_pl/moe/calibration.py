"""The small module that corrects routing probabilities after new experts joined.

Shapes: T tokens, E experts of the base, M experts in all, C = 2 E hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Calibration(nn.Module):
    """Adds a learned correction to routing probabilities: `q = p + W2 gelu(W1 p)`.

    W2 starts at zero, so that a new module changes nothing. The GELU is the exact one. Sizes follow the
    layer: for 8 experts and one new one they are the 9 -> 16 -> 9 of the published code.

    Source: MoExtend, arXiv 2408.03511, section 2.4, in the additive form that its Table 5 prefers and
    its code implements.

    Args:
        num_experts: E, experts of the base layer.
        num_new: Number of new experts, M - E.
        seed: Seed of W1, drawn from N(0, 0.02).
    """

    def __init__(self, num_experts: int, num_new: int, seed: int = 0) -> None:
        super().__init__()
        total, hidden = num_experts + num_new, 2 * num_experts
        generator = torch.Generator().manual_seed(seed)
        self.in_proj = nn.Parameter(torch.randn(hidden, total, generator=generator) * 0.02)
        self.out_proj = nn.Parameter(torch.zeros(total, hidden))

    def forward(self, probs_TM: Tensor) -> Tensor:
        """Returns the calibrated gates.

        Args:
            probs_TM: Routing probabilities in fp32.

        Returns:
            (T, M) gates; they may be negative and need not sum to 1.
        """
        hidden_TC = F.gelu(F.linear(probs_TM, self.in_proj.to(probs_TM.dtype)))
        return probs_TM + F.linear(hidden_TC, self.out_proj.to(probs_TM.dtype))
