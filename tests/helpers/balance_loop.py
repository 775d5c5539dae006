"""The balance loss of one layer as a plain loop over slots and experts."""

from __future__ import annotations

from torch import Tensor

from moextend_pl.moe.usage import RouterRecord


def loop_balance(record: RouterRecord, mask: Tensor) -> float:
    """E times the sum over slots k and experts e of (share of tokens whose k-th choice is e) * (mean probability)."""
    rows = [n for n, real in enumerate(mask.tolist()) if real]
    experts = record.logits.shape[1]
    probs = record.logits.softmax(-1)
    total = 0.0
    for slot in range(record.indices.shape[1]):
        for expert in range(experts):
            share = sum(int(record.indices[n, slot]) == expert for n in rows) / len(rows)
            total += share * sum(float(probs[n, expert]) for n in rows) / len(rows)
    return experts * total
