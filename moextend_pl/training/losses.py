"""Training losses, each the mean over the global batch on any number of ranks.

Shapes: B batch, S sequence, V vocabulary, T tokens, K selected per token, E experts of the layer, R routers,
Q images or tiles of them, N tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moextend_pl.contracts import IGNORE_INDEX, UpcycleSpec
from moextend_pl.moe.usage import RouterRecord

Key = TypeVar("Key")


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
    # All of a layer's experts, also where this rank's tokens reach no new one: ranks sum the same shapes, in one call.
    widest = max(record.num_experts for record in records)
    counts_RE, tokens_R1 = _selections(records, masks_T, choices, widest)
    probs_RE = _sums_of_logits(records, masks_T, partial(torch.softmax, dim=-1), widest)
    mean_probs_RE = probs_RE * _world_size() / tokens_R1
    losses = (counts_RE / tokens_R1 * mean_probs_RE).sum(dim=1).unbind()
    scales = [reference_scale or record.num_experts for record in records]
    scaled = [scale * torch.stack([losses[n] for n in members]).sum() for scale, members in _alike(scales)]
    return sum(scaled[1:], start=scaled[0]) / len(records)


def _alike(keys: Sequence[Key]) -> list[tuple[Key, list[int]]]:
    """Returns each different key with the places where it stands."""
    return [(key, [n for n, other in enumerate(keys) if other == key]) for key in dict.fromkeys(keys)]


def _selections(
    records: Sequence[RouterRecord], masks_T: Sequence[Tensor], choices: int | None, experts: int
) -> tuple[Tensor, Tensor]:
    """Counts on all ranks the selections (R, E) and the counted tokens (R, 1), of which there is one at least."""
    found: dict[int, Tensor] = {}
    for top_k, members in _alike([record.indices[:, :choices].shape[1] for record in records]):
        chosen_RS = torch.stack([records[n].indices[:, :top_k] for n in members]).flatten(1)
        counted_RS = torch.stack([masks_T[n] for n in members]).long().unsqueeze(-1).expand(-1, -1, top_k).flatten(1)
        # Integer sums by index: the same in any order.
        empty_RE = torch.zeros(len(members), experts, dtype=torch.long, device=chosen_RS.device)
        found.update(zip(members, empty_RE.scatter_add_(1, chosen_RS, counted_RS).unbind(), strict=True))
    tokens_R1 = torch.stack(list(masks_T)).sum(dim=1, keepdim=True)
    counts_RE = torch.stack([found[n] for n in range(len(records))])
    counts_RE, tokens_R1 = sum_over_ranks(torch.cat([counts_RE, tokens_R1], dim=1).float()).split([experts, 1], dim=1)
    return counts_RE, tokens_R1.clamp(min=1.0)


def _sums_of_logits(
    records: Sequence[RouterRecord], masks_T: Sequence[Tensor], score: Callable[[Tensor], Tensor], width: int
) -> Tensor:
    """Returns for each record the sum over counted tokens of a function of its logits in fp32, (R, width)."""
    found: dict[int, Tensor] = {}
    for _, members in _alike([(record.logits.shape, record.logits.dtype) for record in records]):
        logits_RTE = torch.stack([records[n].logits for n in members]).float()
        uncounted_RT1 = torch.stack([masks_T[n] for n in members]).logical_not().unsqueeze(-1)
        sums = score(logits_RTE).masked_fill(uncounted_RT1, 0.0).sum(dim=1)
        sums = F.pad(sums, (0, width - sums.shape[1])) if sums.shape[1] < width else sums
        found.update(zip(members, sums.unbind(), strict=True))
    return torch.stack([found[n] for n in range(len(records))])


def router_z_loss(records: Sequence[RouterRecord], masks_T: Sequence[Tensor]) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of router logits, averaged over layers (ST-MoE; CuMo, Eq. 5).

    Args:
        records: One for each layer, with logits before softmax.
        masks_T: One for each layer; True for the tokens that count.

    Returns:
        A scalar in fp32.
    """
    sums_R1 = _sums_of_logits(records, masks_T, lambda logits: logits.logsumexp(dim=-1, keepdim=True).square(), 1)
    return global_mean(sums_R1.squeeze(1), torch.stack(list(masks_T)).sum(dim=1)).mean()


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
