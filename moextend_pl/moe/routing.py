"""Routing mathematics of a layer with new experts: pure functions of router logits.

Shapes: T tokens, D width, E experts that a step starts from, N new experts, M = E + N, K selected per token,
G groups, R members of the largest family (an expert and the new experts grown from it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST_SUM = 1e-6


@dataclass(frozen=True)
class Scoring:
    """How a model family gets from router logits to selected experts and their weights.

    Attributes:
        score: `softmax`, `sigmoid` or `sqrtsoftplus` of the logits, or `sparsemixer` (PhiMoE).
        normalised: Whether the weights of the selected experts are divided by their sum. A softmax over the
            selected logits only is the same as a normalised softmax over all.
        scale: Factor on the weights.
        biased: Whether the selection's bias is added to the `scores` or to the `logits`.
        groups: Number of equal groups of experts, of which `top_groups` are selected from.
        top_groups: See `groups`.
        group_score: A group counts by its `max` score or by the sum of its `top2`.
        group_fill: Whether experts of other groups get score `zero` or minus `inf`.
        jitter: Threshold of `sparsemixer`.
    """

    score: str = "softmax"
    normalised: bool = True
    scale: float = 1.0
    biased: str = "scores"
    groups: int = 1
    top_groups: int = 1
    group_score: str = "top2"
    group_fill: str = "inf"
    jitter: float = 0.0


class Selection(NamedTuple):
    """Chosen experts of each token, before the weights are taken.

    Attributes:
        scores_TM: Scores before calibration; with families, those of the winners, 0 elsewhere.
        gates_TM: Scores after calibration.
        indices_TK: Selected experts.
    """

    scores_TM: Tensor
    gates_TM: Tensor
    indices_TK: Tensor


def renormalise(gates_TK: Tensor) -> Tensor:
    """Divides the selected gates by their sum, guarded against a sum near zero.

    Calibrated gates may be negative and may cancel, which nothing in the paper prevents; a sum smaller
    than `SMALLEST_SUM` in size is replaced by that size with its own sign.

    Args:
        gates_TK: Gates of the selected experts.

    Returns:
        (T, K) gates that sum to 1 wherever the guard is not in force.
    """
    total_T1 = gates_TK.sum(dim=-1, keepdim=True)
    smallest = torch.full_like(total_T1, SMALLEST_SUM).copysign(total_T1)
    return gates_TK / torch.where(total_T1.abs() < SMALLEST_SUM, smallest, total_T1)


def weigh(gates_TK: Tensor, scoring: Scoring) -> Tensor:
    """Turns the gates of the selected experts into routing weights, as the family does.

    Args:
        gates_TK: Calibrated gates.
        scoring: The family's.

    Returns:
        (T, K) weights.
    """
    weights_TK = renormalise(gates_TK) if scoring.normalised else gates_TK
    return weights_TK if scoring.scale == 1.0 else weights_TK * scoring.scale


def scores_of(logits_TE: Tensor, score: str) -> Tensor:
    """Returns scores in fp32.

    Args:
        logits_TE: Router logits.
        score: `softmax`, `sigmoid` or `sqrtsoftplus`.
    """
    logits_TE = logits_TE.float()
    if score == "softmax":
        return logits_TE.softmax(dim=-1)
    return logits_TE.sigmoid() if score == "sigmoid" else F.softplus(logits_TE).sqrt()


def mask_groups(choice_TE: Tensor, scoring: Scoring) -> Tensor:
    """Takes the experts of all but the best groups out of the selection.

    Args:
        choice_TE: What the selection is made by.
        scoring: With more than one group.

    Returns:
        (T, E) with the other groups' experts filled.
    """
    by_group_TGE = choice_TE.unflatten(-1, (scoring.groups, -1))
    if scoring.group_score == "max":
        strength_TG = by_group_TGE.amax(dim=-1)
    else:
        strength_TG = by_group_TGE.topk(2, dim=-1).values.sum(dim=-1)
    best = strength_TG.topk(scoring.top_groups, dim=-1).indices
    keep_TG = torch.zeros_like(strength_TG, dtype=torch.bool).scatter(1, best, True)
    fill = 0.0 if scoring.group_fill == "zero" else float("-inf")
    return by_group_TGE.masked_fill(~keep_TG.unsqueeze(-1), fill).flatten(1)


def sparse_mixer(logits_TE: Tensor, top_k: int, jitter: float) -> tuple[Tensor, Tensor]:
    """Selects one expert after the other, each weighed among the logits close to it, without sampling.

    Args:
        logits_TE: Router logits.
        top_k: K.
        jitter: Logits further than `2 * jitter` (relative) from the best left are not weighed against it.

    Returns:
        (T, E) weights, 0 where not selected, and (T, K) indices.

    Source: SparseMixer, arXiv 2310.00811, as PhiMoE evaluates it.
    """
    logits_TE = logits_TE.float()
    left_TE, chosen, weights_TE = logits_TE, [], torch.zeros_like(logits_TE)
    for _ in range(top_k):
        best_T1, index_T1 = left_TE.max(dim=-1, keepdim=True)
        size_TE = logits_TE.abs().clamp(min=best_T1)
        far_TE = (best_T1 - logits_TE) / size_TE > 2 * jitter
        probs_TE = left_TE.masked_fill(far_TE, float("-inf")).softmax(dim=-1)
        weights_TE = weights_TE.scatter(1, index_T1, probs_TE.gather(1, index_T1))
        left_TE = left_TE.scatter(1, index_T1, float("-inf"))
        chosen.append(index_T1)
    return weights_TE, torch.cat(chosen, dim=-1)


def select(
    logits_TE: Tensor,
    top_k: int,
    scoring: Scoring,
    bias_E: Tensor | None = None,
    closed_TE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores experts and selects the best, as the family does.

    Args:
        logits_TE: Router logits.
        top_k: K.
        scoring: The family's.
        bias_E: Added for the selection only.
        closed_TE: True where a token may not select an expert, whose logit is minus infinity.

    Returns:
        Scores (T, E) in fp32 without the bias, and expert indices (T, K).
    """
    if scoring.score == "sparsemixer":
        return sparse_mixer(logits_TE, top_k, scoring.jitter)
    scores_TE = scores_of(logits_TE, scoring.score)
    choice_TE = scores_TE if scoring.biased == "scores" else logits_TE.float()
    choice_TE = choice_TE if bias_E is None else choice_TE + bias_E.float()
    choice_TE = mask_groups(choice_TE, scoring) if scoring.groups > 1 else choice_TE
    choice_TE = choice_TE if closed_TE is None else choice_TE.masked_fill(closed_TE, float("-inf"))
    return scores_TE, choice_TE.topk(top_k, dim=-1).indices


def family_table(num_experts: int, sources: Sequence[int]) -> Tensor:
    """Lists for each expert the experts that compete for its place.

    Args:
        num_experts: E.
        sources: Expert that each new one was copied from; its length is N.

    Returns:
        (E, R) expert indices; new experts stand before their source, so that they win a tie, and
        short families are filled with the source itself.
    """
    families = [[num_experts + n for n, source in enumerate(sources) if source == e] for e in range(num_experts)]
    longest = 1 + max((len(family) for family in families), default=0)
    rows = [family + [e] * (longest - len(family)) for e, family in enumerate(families)]
    return torch.tensor(rows, dtype=torch.long, device="cpu")


def family_winners(logits_TM: Tensor, families_ER: Tensor) -> tuple[Tensor, Tensor]:
    """Lets each family send its strongest member.

    Args:
        logits_TM: Router logits, old experts first.
        families_ER: As made by `family_table`.

    Returns:
        Logits (T, E) and indices (T, E) of the winners.
    """
    members_TER = logits_TM[:, families_ER]
    winning_TE, strongest_TE = members_TER.max(dim=-1)
    winners_TE = families_ER.expand(len(logits_TM), -1, -1).gather(2, strongest_TE.unsqueeze(-1)).squeeze(-1)
    return winning_TE, winners_TE


def seat_winners(parent: Selection, winners_TE: Tensor, num_experts: int) -> Selection:
    """Gives the places that old experts won to the strongest members of their families.

    Args:
        parent: Selection among the E families.
        winners_TE: Member that each family sent.
        num_experts: M.

    Returns:
        The same selection among all M experts.
    """
    empty_TM = parent.scores_TM.new_zeros(len(winners_TE), num_experts)
    return Selection(
        empty_TM.scatter(1, winners_TE, parent.scores_TM),
        empty_TM.scatter(1, winners_TE, parent.gates_TM),
        winners_TE.gather(1, parent.indices_TK),
    )


def join_gates(scores_TM: Tensor, parent: Selection) -> Tensor:
    """Adds newcomers to gates that an earlier extension has calibrated.

    The earlier correction stays, in the share of the score that the newcomers leave to the old experts.

    Args:
        scores_TM: Scores of all experts, old ones first.
        parent: Selection among the E old ones.

    Returns:
        (T, M) gates; the scores themselves if nothing was corrected before.
    """
    if parent.gates_TM is parent.scores_TM:
        return scores_TM
    old = parent.scores_TM.shape[1]
    left_T1 = scores_TM[:, :old].sum(dim=-1, keepdim=True) / parent.scores_TM.sum(dim=-1, keepdim=True)
    correction_TE = (parent.gates_TM - parent.scores_TM) * left_T1
    return scores_TM + F.pad(correction_TE, (0, scores_TM.shape[1] - old))
