"""The small module that corrects routing scores after new experts joined.

Shapes: T tokens, E experts of the layer before, M experts in all, C = 2 E hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Calibration(nn.Module):
    """Adds a learned correction to routing scores, `q = p + d(p)`, or multiplies by one, `q = p (1 + d(p))`.

    `d(p) = W2 gelu(W1 p)` with the exact GELU. W2 starts at zero, so that a new module changes nothing.
    Sizes follow the layer: for 8 experts and one new one they are the 9 -> 16 -> 9 of the published code.

    Source: MoExtend, arXiv 2408.03511, section 2.4; additive is what its Table 5 prefers and its code
    implements, multiplicative is its Eq. 10.

    Args:
        num_experts: E.
        num_new: Number of new experts, M - E.
        form: `additive` or `multiplicative`.
        seed: Seed of W1, drawn from N(0, 0.02).
    """

    def __init__(self, num_experts: int, num_new: int, form: str = "additive", seed: int = 0) -> None:
        super().__init__()
        total, hidden = num_experts + num_new, 2 * num_experts
        self.form = form
        # On the CPU, whatever the default device is: the same numbers everywhere; `grow` moves them to the router.
        generator = torch.Generator("cpu").manual_seed(seed)
        self.in_proj = nn.Parameter(torch.randn(hidden, total, generator=generator, device="cpu") * 0.02)
        self.out_proj = nn.Parameter(torch.zeros(total, hidden, device="cpu"))

    def forward(self, scores_TM: Tensor, gates_TM: Tensor | None = None) -> Tensor:
        """Returns the calibrated gates.

        Args:
            scores_TM: Routing scores in fp32.
            gates_TM: What is corrected, if an earlier calibration came before; by default the scores.

        Returns:
            (T, M) gates; they may be negative and need not sum to 1.
        """
        gates_TM = scores_TM if gates_TM is None else gates_TM
        hidden_TC = F.gelu(F.linear(scores_TM, self.in_proj.to(scores_TM.dtype)))
        correction_TM = F.linear(hidden_TC, self.out_proj.to(scores_TM.dtype))
        return gates_TM + correction_TM if self.form == "additive" else gates_TM * (1 + correction_TM)
