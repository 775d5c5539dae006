"""What routing with new experts is, token by token, as a loop that shares nothing with the package."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def plain_routing(
    logits_TM: Tensor,
    open_T: Tensor,
    base: tuple[Tensor, Tensor],
    sources_N: Tensor,
    calibration: tuple[Tensor, Tensor] | None,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """Selects and weighs experts, see `calibrated_routing`; of equal ones the first, of a family the new ones first."""
    rows = []
    for t, logits_M in enumerate(logits_TM):
        if open_T[t]:
            rows.append(one_token(logits_M, base[0].shape[1], sources_N.tolist(), calibration, how))
        else:
            rows.append((base[0][t], base[1][t]))
    return torch.stack([one[0] for one in rows]), torch.stack([one[1] for one in rows])


def one_token(
    logits_M: Tensor, top_k: int, sources: list[int], calibration: Any, how: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Routes one token."""
    old = len(logits_M) - len(sources)
    alive = list(range(len(logits_M)))
    if how["families"]:
        members = [[old + n for n, s in enumerate(sources) if s == e] + [e] for e in range(old)]
        alive = sorted(max(family, key=lambda m: (logits_M[m].item(), -family.index(m))) for family in members)
    powers = {m: torch.exp(logits_M[m] - logits_M.max()) for m in alive}
    total = sum(powers.values())
    scores = torch.stack([powers[m] / total if m in powers else logits_M.new_zeros(()) for m in range(len(logits_M))])
    chosen = sorted(alive, key=lambda m: (-scores[m].item(), m))[:top_k]
    gates = scores
    if calibration is not None:
        hidden = calibration[0] @ scores
        correction = calibration[1] @ (0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
        gates = scores + correction if how["form"] == "additive" else scores * (1 + correction)
    weights = torch.stack([gates[m] for m in chosen])
    if how["normalised"]:
        size = weights.sum()
        weights = weights / (size if size.abs() >= 1e-6 else torch.full((), 1e-6).copysign(size.detach()))
    return weights * how["scale"], torch.tensor(chosen)
