"""AIM, first half: picture tokens that are alike become one, between projector and language model (arXiv 2412.03248).

Shapes: B pictures, N tokens of one, C width, R tokens merged away in a round.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def merged_count(tokens: int, rounds: int) -> int:
    """Returns how many tokens of a picture are left.

    Args:
        tokens: N before the first round.
        rounds: How many there are; each halves the tokens, rounded up a little.
    """
    left = tokens
    for divisor in _divisors(rounds):
        left -= min(tokens // divisor, left // 2)
    return left


def merge_tokens(x_BNC: Tensor, rounds: int) -> Tensor:
    """Merges the tokens of each picture in rounds, of N / 2, N / 4, N / 8 ... of them.

    Args:
        x_BNC: Projected features; what is alike is told by their cosine.
        rounds: How many; 0 changes nothing, 2 keeps a quarter.

    Returns:
        (B, `merged_count`, C); within a round tokens that were not merged stand first, the most alike ones before
        others, then those into which others were merged. It is the order of the published code, and not that of places.
    """
    tokens = x_BNC.shape[1]
    for divisor in _divisors(rounds):
        x_BNC = merge_most_alike(x_BNC, min(tokens // divisor, x_BNC.shape[1] // 2))
    return x_BNC


def _divisors(rounds: int) -> list[int]:
    return [2 ** (number + 1) for number in range(rounds)]


def merge_most_alike(x_BNC: Tensor, count: int) -> Tensor:
    """Merges those tokens at even places that are most like one at an odd place into it, as a mean of all that meet.

    Args:
        x_BNC: Tokens.
        count: R, at most half of N; 0 changes nothing.

    Returns:
        (B, N - R, C), see `merge_tokens`.
    """
    if count == 0:
        return x_BNC
    unit_BNC = F.normalize(x_BNC.float(), dim=-1)
    nearest = (unit_BNC[:, ::2] @ unit_BNC[:, 1::2].transpose(1, 2)).max(dim=-1)
    order = nearest.values.argsort(dim=1, descending=True, stable=True).unsqueeze(-1)
    gone_BR1, left_BL1 = order[:, :count], order[:, count:]
    even_BNC, odd_BNC = x_BNC[:, ::2], x_BNC[:, 1::2]
    width = x_BNC.shape[-1]
    into_BR1 = nearest.indices.unsqueeze(-1).gather(1, gone_BR1)
    merged_BNC = odd_BNC.scatter_reduce(
        1, into_BR1.expand(-1, -1, width), even_BNC.gather(1, gone_BR1.expand(-1, -1, width)), "mean"
    )
    return torch.cat([even_BNC.gather(1, left_BL1.expand(-1, -1, width)), merged_BNC], dim=1)
