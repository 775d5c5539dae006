"""Training losses, each the mean over the global batch on any number of ranks.

Shapes: B batch, S sequence, V vocabulary, T tokens, K selected per token, E experts of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moextend_pl.contracts import IGNORE_INDEX
from moextend_pl.moe.usage import RouterRecord, selection_counts


def sum_over_ranks(value: Tensor) -> Tensor:
    """Returns the sum of a tensor over all ranks, detached; the tensor itself where there is one rank."""
    total = value.detach().clone()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_mean(local_sum: Tensor, local_count: Tensor) -> Tensor:
    """Scales a local sum so that the mean of the result over ranks is the mean over the global batch.

    Distributed training averages gradients over ranks; a mean taken on each rank alone would weigh the
    tokens of a rank with few of them too much.

    Args:
        local_sum: Sum over this rank's items.
        local_count: Number of this rank's items.

    Returns:
        A scalar; 0 where no rank has an item.
    """
    return local_sum * _world_size() / sum_over_ranks(local_count.float()).clamp(min=1.0)


def learned_tokens(labels_BS: Tensor) -> int:
    """Counts the learned tokens of the global batch: the weight of a batch in a mean over a set.

    With it a mean of batch means is the mean over all tokens, on any number of ranks and with any fillers.

    Args:
        labels_BS: Labels as they stand in a batch; the first of a row is never learned.
    """
    return int(sum_over_ranks((labels_BS[:, 1:] != IGNORE_INDEX).sum()))


def token_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Mean cross-entropy of the learned tokens of the global batch.

    Args:
        logits_TV: Predictions for the positions of `labels_T`.
        labels_T: Ids to predict; `IGNORE_INDEX` is not learned.

    Returns:
        A scalar in fp32.
    """
    total = F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORE_INDEX, reduction="sum")
    return global_mean(total, (labels_T != IGNORE_INDEX).sum())


def balance_loss(
    records: Sequence[RouterRecord], masks_T: Sequence[Tensor], reference_scale: int | None = None
) -> Tensor:
    """Load-balancing loss, by layer with that layer's own number of experts, then averaged over layers.

    For one layer: E * sum_k sum_e f_ke P_e, with f_ke the share of tokens whose k-th choice is e, and
    P_e the mean probability of e (MoExtend, section 2; the form of Switch Transformer). It is K when
    routing is uniform.

    Args:
        records: One for each layer, with logits before softmax.
        masks_T: One for each layer; True for the tokens that count.
        reference_scale: Factor used for every layer instead of E. The published code multiplies by 9
            also in layers of 8 experts; only for comparison with it.

    Returns:
        A scalar in fp32.
    """
    losses = [_layer_balance(record, mask_T, reference_scale) for record, mask_T in zip(records, masks_T, strict=True)]
    return torch.stack(losses).mean()


def _layer_balance(record: RouterRecord, mask_T: Tensor, reference_scale: int | None) -> Tensor:
    # All of the layer's experts, also where this rank's tokens reach no new one: ranks sum the same shapes.
    experts = record.num_experts
    probs_TE = F.pad(record.logits.float().softmax(dim=-1)[mask_T], (0, experts - record.logits.shape[-1]))
    counts_E = sum_over_ranks(selection_counts(record.indices, experts, mask_T).float())
    tokens = sum_over_ranks(mask_T.sum().float()).clamp(min=1.0)
    mean_probs_E = global_mean(probs_TE.sum(dim=0), mask_T.sum())
    return (reference_scale or experts) * (counts_E / tokens * mean_probs_E).sum()
