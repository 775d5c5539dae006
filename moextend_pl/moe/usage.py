"""How often each expert is selected: counts, shares, and the metric that gathers them.

Shapes: T tokens, K selected per token, E experts of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

TOKEN_KINDS = ("image", "text")


@dataclass(frozen=True)
class RouterRecord:
    """What one router did in one forward pass.

    Attributes:
        layer: 0-based decoder layer.
        num_experts: Experts of the layer as it stands, new ones included.
        logits: (T, E) logits before softmax; fewer columns if no token could reach new experts.
        indices: (T, K) selected experts.
        sequences: Number of images or sequences that the tokens divide into, one after another; 1 where
            they are not told apart.
    """

    layer: int
    num_experts: int
    logits: Tensor
    indices: Tensor
    sequences: int = 1


def selection_counts(indices_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Counts the top-k selections of each expert.

    Args:
        indices_TK: Selected experts.
        num_experts: E.
        mask_T: True for the tokens that count; None counts all.

    Returns:
        (E,) int64 counts.
    """
    # Integer sums by index: the same in any order, and of a size that no value decides.
    counted_TK = torch.ones_like(indices_TK) if mask_T is None else mask_T.long().unsqueeze(1).expand_as(indices_TK)
    counts_E = torch.zeros(num_experts, dtype=torch.long, device=indices_TK.device)
    return counts_E.scatter_add_(0, indices_TK.reshape(-1), counted_TK.reshape(-1))


def usage_shares(counts_E: Tensor) -> Tensor:
    """Turns counts into shares of all selections of the layer.

    Args:
        counts_E: Selections of each expert.

    Returns:
        (E,) float64 shares that sum to 1, or zeros if nothing was counted (MoExtend, Eq. 4-5).

    Example:
        >>> usage_shares(torch.tensor([1, 3]))
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    counts = counts_E.double()
    return counts / counts.sum().clamp(min=1.0)


class ExpertUsage(Metric):
    """Counts selections by layer, apart for image tokens and text tokens, over batches and ranks.

    Args:
        num_experts: Number of experts of each mixture-of-experts layer, by layer index.
    """

    full_state_update = False

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        super().__init__()
        self.layers = dict(num_experts)
        for layer, count in self.layers.items():
            for kind in TOKEN_KINDS:
                self.add_state(f"{kind}_{layer}", torch.zeros(count, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, records: list[RouterRecord], is_image_T: Tensor, is_real_T: Tensor) -> None:
        """Adds one forward pass.

        Args:
            records: One for each mixture-of-experts layer.
            is_image_T: True on image placeholders.
            is_real_T: False on padding and fillers, which are not counted.
        """
        masks = {"image": is_image_T & is_real_T, "text": ~is_image_T & is_real_T}
        for record in records:
            for kind, mask_T in masks.items():
                counts = getattr(self, f"{kind}_{record.layer}")
                counts += selection_counts(record.indices, self.layers[record.layer], mask_T)

    def compute(self) -> dict[str, dict[int, Tensor]]:
        """Returns counts (E,) by token kind (`image`, `text`, `all`) and layer."""
        kinds = {kind: {layer: getattr(self, f"{kind}_{layer}") for layer in self.layers} for kind in TOKEN_KINDS}
        kinds["all"] = {layer: kinds["image"][layer] + kinds["text"][layer] for layer in self.layers}
        return kinds
