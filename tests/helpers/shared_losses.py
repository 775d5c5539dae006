"""Losses of a batch that several processes share; run as a script by each of them: RANK WORLD OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moextend_pl.contracts import IGNORE_INDEX
from moextend_pl.losses import balance_loss, token_loss
from moextend_pl.moe.usage import RouterRecord

TOKENS, EXPERTS = 12, 5


def values_of(rank: int, world: int) -> dict[str, Tensor]:
    """Returns losses and gradients of one rank's share of the tokens, averaged over ranks as DDP does."""
    draw = torch.Generator().manual_seed(0)
    x, head, gate = (torch.randn(rows, 6, generator=draw) for rows in (TOKENS, 9, EXPERTS))
    labels = torch.randint(0, 9, (TOKENS,), generator=draw)
    labels[1:6] = IGNORE_INDEX  # the first half learns one token, the second half six
    counted = torch.ones(TOKENS, dtype=torch.bool)
    counted[2:5] = False
    part = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world)
    x, labels, counted = x[part], labels[part], counted[part]
    head.requires_grad_()
    gate.requires_grad_()
    # The first rank knows the first four experts only, as where none of its tokens may reach a new one.
    logits = x @ (gate if world == 1 or rank else gate[:4]).T
    if world == 1:
        logits = torch.cat([logits[:6].index_fill(1, torch.tensor([4]), -torch.inf), logits[6:]])
    token = token_loss(x @ head.T, labels)
    balance = balance_loss([RouterRecord(0, EXPERTS, logits, logits.topk(2).indices)], [counted])
    (token + balance).backward()
    values = {"token": token.detach(), "balance": balance.detach(), "head": head.grad, "gate": gate.grad}
    if world > 1:
        for value in values.values():
            dist.all_reduce(value)
            value /= world
    return values


if __name__ == "__main__":
    number, count = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", rank=number, world_size=count)
    shared = values_of(number, count)
    if number == 0:
        torch.save(shared, Path(sys.argv[3]))
    dist.destroy_process_group()
