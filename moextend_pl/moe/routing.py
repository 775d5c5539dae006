"""Routing mathematics of an extended layer: pure functions of router logits.

Shapes: T tokens, D width, E experts of the base, N new experts, M = E + N, K selected per token,
R members of the largest family (an expert and the new experts grown from it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SMALLEST_SUM = 1e-6
Calibrate = Callable[[Tensor], Tensor]


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


def route_among_all(logits_TM: Tensor, top_k: int, calibrate: Calibrate) -> tuple[Tensor, Tensor]:
    """Lets old and new experts compete for every slot, as the paper does.

    Selection is by the probabilities before calibration; the gates are gathered after it
    (MoExtend, arXiv 2408.03511, Eq. 2 and 10 in the form of the published code).

    Args:
        logits_TM: Router logits, base experts first.
        top_k: Experts per token, K.
        calibrate: Maps probabilities (T, M) to calibrated gates (T, M).

    Returns:
        Gates (T, K) in fp32 and expert indices (T, K).
    """
    probs_TM = logits_TM.float().softmax(dim=-1)
    indices_TK = probs_TM.topk(top_k, dim=-1).indices
    return renormalise(calibrate(probs_TM).gather(1, indices_TK)), indices_TK


def family_table(num_experts: int, sources: Sequence[int]) -> Tensor:
    """Lists for each base expert the experts that compete for its place.

    Args:
        num_experts: E.
        sources: Base expert that each new expert was copied from; its length is N.

    Returns:
        (E, R) expert indices; new experts stand before their source, so that they win a tie, and
        short families are filled with the source itself.
    """
    families = [[num_experts + n for n, source in enumerate(sources) if source == e] for e in range(num_experts)]
    longest = 1 + max((len(family) for family in families), default=0)
    rows = [family + [e] * (longest - len(family)) for e, family in enumerate(families)]
    return torch.tensor(rows, dtype=torch.long)


def route_within_families(
    logits_TM: Tensor, top_k: int, calibrate: Calibrate, families_ER: Tensor
) -> tuple[Tensor, Tensor]:
    """Lets a new expert compete with its source only, so that a fresh copy changes nothing.

    Each family sends its strongest member; the E winners are routed as the base routes its E experts.
    A new expert thus takes tokens from its source and never evicts another expert. While the copy and
    its source are equal, the output is the base's for every token.

    Args:
        logits_TM: Router logits, base experts first.
        top_k: Experts per token, K.
        calibrate: Maps probabilities (T, M) to calibrated gates (T, M); losers have probability 0.
        families_ER: As made by `family_table`.

    Returns:
        Gates (T, K) in fp32 and expert indices (T, K) among all M.
    """
    members_TER = logits_TM.float()[:, families_ER]
    strongest_TE = members_TER.argmax(dim=-1)
    winners_TE = (
        families_ER.unsqueeze(0).expand(len(logits_TM), -1, -1).gather(2, strongest_TE.unsqueeze(-1)).squeeze(-1)
    )
    winning_logits_TE = members_TER.gather(2, strongest_TE.unsqueeze(-1)).squeeze(-1)
    probs_TE = winning_logits_TE.softmax(dim=-1)
    slots_TK = probs_TE.topk(top_k, dim=-1).indices
    indices_TK = winners_TE.gather(1, slots_TK)
    probs_TM = torch.zeros(logits_TM.shape, dtype=probs_TE.dtype, device=probs_TE.device)
    probs_TM = probs_TM.scatter(1, winners_TE, probs_TE)
    return renormalise(calibrate(probs_TM).gather(1, indices_TK)), indices_TK
