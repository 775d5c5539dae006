"""Training losses, each the mean over the global batch on any number of ranks.

Shapes: B batch, S sequence, V vocabulary, T tokens, K selected per token, E experts of the layer, R routers,
Q images or tiles of them, N tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moextend_pl.contracts import IGNORE_INDEX, UpcycleSpec
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


def count_learned(labels_BS: Tensor) -> Tensor:
    """Counts the learned tokens of this rank's batch, on its device.

    Args:
        labels_BS: As in `learned_tokens`.
    """
    return (labels_BS[:, 1:] != IGNORE_INDEX).sum()


def learned_tokens(labels_BS: Tensor) -> int:
    """Counts the learned tokens of the global batch: the weight of a batch in a mean over a set.

    With it a mean of batch means is the mean over all tokens, on any number of ranks and with any fillers.

    Args:
        labels_BS: Labels as they stand in a batch; the first of a row is never learned.
    """
    return int(sum_over_ranks(count_learned(labels_BS)))


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
    records: Sequence[RouterRecord],
    masks_T: Sequence[Tensor],
    reference_scale: int | None = None,
    choices: int | None = None,
) -> Tensor:
    """Load-balancing loss, by layer with that layer's own number of experts, then averaged over layers.

    For one layer: E * sum_k sum_e f_ke P_e, with f_ke the share of tokens whose k-th choice is e, and
    P_e the mean probability of e (MoExtend, section 2; the form of Switch Transformer). It is K when
    routing is uniform over all experts.

    Args:
        records: One for each layer, with logits before softmax.
        masks_T: One for each layer; True for the tokens that count.
        reference_scale: Factor used for every layer instead of E. The published code multiplies by 9
            also in layers of 8 experts; only for comparison with it.
        choices: How many of a token's choices count, best first; None counts all K. CuMo counts one, and
            its loss is 1 when routing is uniform.

    Returns:
        A scalar in fp32.
    """
    losses = [
        _layer_balance(record, mask_T, reference_scale, choices)
        for record, mask_T in zip(records, masks_T, strict=True)
    ]
    return torch.stack(losses).mean()


def _layer_balance(record: RouterRecord, mask_T: Tensor, reference_scale: int | None, choices: int | None) -> Tensor:
    # All of the layer's experts, also where this rank's tokens reach no new one: ranks sum the same shapes.
    experts = record.num_experts
    probs_TE = record.logits.float().softmax(dim=-1).masked_fill(~mask_T.unsqueeze(1), 0.0)
    probs_TE = F.pad(probs_TE, (0, experts - record.logits.shape[-1]))
    counts_E = sum_over_ranks(selection_counts(record.indices[:, :choices], experts, mask_T).float())
    tokens = sum_over_ranks(mask_T.sum().float()).clamp(min=1.0)
    mean_probs_E = global_mean(probs_TE.sum(dim=0), mask_T.sum())
    return (reference_scale or experts) * (counts_E / tokens * mean_probs_E).sum()


def router_z_loss(records: Sequence[RouterRecord], masks_T: Sequence[Tensor]) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of router logits, averaged over layers (ST-MoE; CuMo, Eq. 5).

    Args:
        records: One for each layer, with logits before softmax.
        masks_T: One for each layer; True for the tokens that count.

    Returns:
        A scalar in fp32.
    """
    losses = [
        global_mean(record.logits.float().logsumexp(dim=-1).square().masked_fill(~mask_T, 0.0).sum(), mask_T.sum())
        for record, mask_T in zip(records, masks_T, strict=True)
    ]
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class RouterLosses:
    """Losses of the routers of one part of the model that sees images; scalars in fp32.

    Attributes:
        balance: 1 when routing is uniform.
        z: Mean squared log-sum-exp of the logits.
    """

    balance: Tensor
    z: Tensor


def image_router_losses(
    records: Sequence[RouterRecord], images: int, routers: int, spec: UpcycleSpec, device: torch.device
) -> RouterLosses:
    """Losses of the routers of a tower or projector, the mean over all images of the global batch.

    Every image has the same number of tokens, so that any mean over tokens is a mean over images. Layers
    weigh alike, and so do the scales of a multi-scale tower. Every rank takes part in the same sums over
    ranks, also one that has no image and thus no record.

    Args:
        records: What the routers did with this rank's images; empty without images.
        images: Number of this rank's images.
        routers: R, records of one pass.
        spec: Number of experts, K and the way to count.
        device: Where the losses are needed.

    Returns:
        Balance loss `E * sum_e f_e P_e` with f_e the share of choices of expert e and P_e its mean
        probability, taken as `spec.counting` says, and the z-loss.
    """
    count = torch.full((), float(images), device=device)
    shares_RE = torch.zeros(routers, spec.experts, device=device)
    if spec.counting == "paper":
        if records:
            shares_RE = torch.stack([_shares(r.indices.reshape(1, -1), spec.experts)[0] for r in records])
        shares_RE = sum_over_ranks(shares_RE * images) / sum_over_ranks(count).clamp(min=1.0)
    zero = torch.zeros((), device=device)
    balance, z = [zero], [zero]
    if records:
        balance = [_image_balance(record, shares_E, spec) for record, shares_E in zip(records, shares_RE, strict=True)]
        z = [record.logits.float().logsumexp(dim=-1).square().mean() for record in records]
    return RouterLosses(*(global_mean(torch.stack(values).mean() * images, count) for values in (balance, z)))


def _shares(indices_QN: Tensor, experts: int) -> Tensor:
    return F.one_hot(indices_QN, experts).float().mean(dim=1)


def _image_balance(record: RouterRecord, shares_E: Tensor, spec: UpcycleSpec) -> Tensor:
    probs_QNE = record.logits.float().softmax(dim=-1).unflatten(0, (record.sequences, -1))
    if spec.counting == "paper":
        return spec.experts * (shares_E * probs_QNE.mean(dim=(0, 1))).sum()
    shares_QE = _shares(record.indices[:, 0].unflatten(0, (record.sequences, -1)), spec.experts)
    return spec.experts * (shares_QE * probs_QNE.mean(dim=1)).sum(dim=-1).mean()
