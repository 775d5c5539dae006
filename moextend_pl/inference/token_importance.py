"""AIM, second half, as pure functions: how much each token matters in a layer, and which ones stay (arXiv 2412.03248).

Shapes: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

TEMPERATURE, STEPS = 0.1, 5


def importance(heads: Iterable[Tensor], walks_from_BN: Tensor) -> Tensor:
    """Rates tokens by a walk along attention: PageRank without damping, the root mean square over heads.

    Args:
        heads: For each head logits of attention before softmax, (B, N, N), minus infinity where a token is not read.
            They are taken one after the other: all of them together take gigabytes.
        walks_from_BN: True for tokens that the walk begins at, all alike.

    Returns:
        (B, N) in fp32; 0 for a token that the walk never reaches.
    """
    starts_BN = walks_from_BN.float() / walks_from_BN.sum(dim=1, keepdim=True).clamp(min=1)
    squares_BN, count = torch.zeros_like(starts_BN), 0
    for logits_BNN in heads:
        # A row of padding reads nothing, and no walk comes there.
        steps_BNN = (logits_BNN.float() / TEMPERATURE).softmax(dim=-1).nan_to_num(0.0)
        at_B1N = starts_BN.unsqueeze(1)
        for _ in range(STEPS):
            at_B1N = at_B1N @ steps_BNN
        squares_BN, count = squares_BN + at_B1N.squeeze(1).square(), count + 1
    return (squares_BN / count).sqrt()


def kept_share(layer: int, first: int, last: int) -> float:
    """Returns the share of all picture tokens that is still there after a layer.

    Args:
        layer: Its index.
        first: l1, the first layer after which tokens are dropped.
        last: l2; after the layer before it none is left.
    """
    return 1.0 if layer < first else max(0.0, 1 - (layer - first + 1) / (last - first))


def most_important(scores_BN: Tensor, is_image_BN: Tensor, counts_B: Tensor) -> Tensor:
    """Returns which picture tokens stay.

    Args:
        scores_BN: How much each matters; of equal ones the first stays.
        is_image_BN: True for picture tokens that are still there.
        counts_B: How many of a row stay, at most.

    Returns:
        (B, N) booleans.
    """
    order_BN = scores_BN.masked_fill(~is_image_BN, -1.0).argsort(dim=1, descending=True, stable=True)
    ranks_BN = order_BN.argsort(dim=1)
    return is_image_BN & (ranks_BN < counts_B.unsqueeze(1))
