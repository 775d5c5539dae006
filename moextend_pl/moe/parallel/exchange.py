"""Tokens travel to the ranks that hold their experts, and what the experts make of them comes back.

A token is sent once to each rank that holds any of its experts, with its indices and routing weights there; that rank
sends the weighted sum of what its own experts say. The backward pass goes the same way, for tokens and weights. Which
ranks need one is agreed with the numbers of tokens, so that all of them take part in it or none does.

Shapes: T tokens of this rank, K selected per token, E experts in all, N ranks, L = E / N experts of a rank, P pairs of
a token and a rank that it is sent to, sorted by rank, R tokens that arrive here, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moextend_pl.moe.dispatch import PARALLEL_EXPERTS, frozen_experts_forward, sum_slots
from moextend_pl.moe.parallel.cut import is_cut, own_experts, ranks_of


@dataclass(frozen=True)
class Journey:
    """Which tokens of a pass travel where.

    Attributes:
        group: The ranks that share the experts.
        tokens_P: Token of each pair.
        ranks_P: Rank of each pair.
        pairs_TN: Pair of each token and rank; P where the token is not sent there.
        leaving: Number of tokens that are sent to each rank.
        arriving: Number of tokens that come from each rank.
        learns: Whether any of the ranks needs a backward pass.
    """

    group: dist.ProcessGroup
    tokens_P: Tensor
    ranks_P: Tensor
    pairs_TN: Tensor
    leaving: list[int]
    arriving: list[int]
    learns: bool


def parallel_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Computes the weighted sum of the selected experts, wherever they are; all ranks have to call it together.

    Args:
        self: Experts module of a transformers model; one that is not cut is computed here.
        hidden_states: (T, D).
        top_k_index: (T, K); E and above are skipped.
        top_k_weights: (T, K).

    Returns:
        (T, D).
    """
    if not is_cut(self):
        return frozen_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    mine = own_experts(self)
    needed = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
    journey = plan_journey(top_k_index, mine.num_experts, ranks_of(self), needed)
    indices_PK = top_k_index[journey.tokens_P] - journey.ranks_P.unsqueeze(1) * mine.num_experts
    elsewhere_PK = (indices_PK < 0) | (indices_PK >= mine.num_experts)
    indices_PK = indices_PK.masked_fill(elsewhere_PK, mine.num_experts)
    x_PD = _Spread.apply(hidden_states, journey.tokens_P, journey.pairs_TN)
    weights_PK = _Spread.apply(top_k_weights, journey.tokens_P, journey.pairs_TN).masked_fill(elsewhere_PK, 0.0)
    if journey.learns and not needed:  # then other ranks do, and wait for this one's part in their backward pass
        weights_PK = weights_PK.detach().requires_grad_()
    with torch.no_grad():
        (indices_RK,) = _sent((indices_PK.to(torch.int32),), journey.leaving, journey.arriving, journey.group)
    x_RD, weights_RK = _Travel.apply(journey, False, x_PD, weights_PK)
    if len(x_RD):
        y_RD = frozen_experts_forward(mine, x_RD, indices_RK.long(), weights_RK)
    else:  # from no token some products would not be taken
        y_RD = x_RD * weights_RK.sum(1, keepdim=True).to(x_RD.dtype)
    (y_PD,) = _Travel.apply(journey, True, y_RD)
    output: Tensor = _Collect.apply(y_PD, journey.tokens_P, journey.pairs_TN)
    return output.to(hidden_states.dtype)


def use(model: PreTrainedModel) -> None:
    """Lets a model whose experts are cut compute them where they are.

    Args:
        model: A transformers model.
    """
    ALL_EXPERTS_FUNCTIONS.register(PARALLEL_EXPERTS, parallel_experts_forward)
    model.set_experts_implementation(PARALLEL_EXPERTS)


def plan_journey(indices_TK: Tensor, each: int, group: dist.ProcessGroup, needed: bool) -> Journey:
    """Finds out which tokens travel where, and agrees with the other ranks on what is going to be sent.

    Args:
        indices_TK: Selected experts; E and above are nobody's.
        each: L.
        group: The ranks that share the experts.
        needed: Whether this rank needs a backward pass.
    """
    ranks = dist.get_world_size(group)
    sent_TN = torch.zeros(len(indices_TK), ranks + 1, dtype=torch.bool, device=indices_TK.device)
    sent_TN = sent_TN.scatter_(1, (indices_TK // each).clamp(max=ranks), True)[:, :ranks]
    sent_NT = sent_TN.T.contiguous()
    ranks_P, tokens_P = sent_NT.nonzero(as_tuple=True)
    pairs_NT = (sent_NT.flatten().cumsum(0) - 1).view_as(sent_NT).masked_fill(~sent_NT, len(tokens_P))
    leaving_N2 = F.pad(sent_NT.sum(1, keepdim=True), (0, 1), value=int(needed))
    arriving_N2 = torch.empty_like(leaving_N2)
    dist.all_to_all_single(arriving_N2, leaving_N2, group=group)
    leaving, arriving = leaving_N2[:, 0].tolist(), arriving_N2.tolist()
    return Journey(
        group=group,
        tokens_P=tokens_P,
        ranks_P=ranks_P,
        pairs_TN=pairs_NT.T.contiguous(),
        leaving=leaving,
        arriving=[tokens for tokens, _ in arriving],
        learns=any(learns for _, learns in arriving),
    )


def _sent(tensors: tuple[Tensor, ...], leaving: list[int], arriving: list[int], group: Any) -> tuple[Tensor, ...]:
    """Sends rows of tensors to other ranks, one tensor after another, and returns what came from them."""
    came = []
    for tensor in tensors:
        came.append(tensor.new_empty(sum(arriving), *tensor.shape[1:]))
        dist.all_to_all_single(came[-1], tensor.contiguous(), arriving, leaving, group=group)
    return tuple(came)


class _Travel(torch.autograd.Function):
    """Rows to other ranks, or back; gradients the other way, all tensors of a call in one order on all ranks."""

    @staticmethod
    def forward(ctx: Any, journey: Journey, back: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.journey, ctx.back = journey, back
        ends = (journey.arriving, journey.leaving) if back else (journey.leaving, journey.arriving)
        return _sent(tensors, *ends, journey.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        journey = ctx.journey
        ends = (journey.leaving, journey.arriving) if ctx.back else (journey.arriving, journey.leaving)
        return (None, None, *_sent(gradients, *ends, journey.group))


class _Spread(torch.autograd.Function):
    """Rows of tokens -> rows of pairs. Gradients are added up in one order, which indexing leaves open on a GPU."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tokens_P: Tensor, pairs_TN: Tensor) -> Tensor:
        ctx.save_for_backward(pairs_TN)
        return x_TD.index_select(0, tokens_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_PD: Tensor) -> tuple[Tensor, None, None]:
        (pairs_TN,) = ctx.saved_tensors
        return sum_slots(F.pad(dx_PD, (0, 0, 0, 1)), pairs_TN, None), None, None


class _Collect(torch.autograd.Function):
    """Rows of pairs -> their sums by token."""

    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, tokens_P: Tensor, pairs_TN: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_P)
        return sum_slots(F.pad(y_PD, (0, 0, 0, 1)), pairs_TN, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None]:
        (tokens_P,) = ctx.saved_tensors
        return dy_TD.index_select(0, tokens_P), None, None
