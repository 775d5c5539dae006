"""A zero that keeps every learning parameter in the graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def touch(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Returns a zero that depends on every learning parameter, so that each always has a gradient.

    Without it a rank whose tokens reach no new expert has no gradient to reduce and its peers wait.

    Args:
        parameters: Parameters of which the learning ones are touched.

    Returns:
        A scalar 0, or None if nothing learns here and now.
    """
    learning = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    return torch.stack([p.flatten()[0].float() for p in learning]).sum() * 0.0 if learning else None
