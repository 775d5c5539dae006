"""Losses of a batch that several processes share; run as a script by each of them: RANK WORLD OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moextend_pl.contracts import COUNTINGS, IGNORE_INDEX, UpcycleSpec
from moextend_pl.moe.usage import RouterRecord
from moextend_pl.training.losses import balance_loss, image_router_losses, token_loss

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
    for counting in COUNTINGS:
        values |= {f"{counting} {name}": value for name, value in image_values(rank, world, counting).items()}
    if world > 1:
        for value in values.values():
            dist.all_reduce(value)
            value /= world
    return values


def image_values(rank: int, world: int, counting: str) -> dict[str, Tensor]:
    """Returns losses and gradients of two routers with this rank's images: three on the first, none on the second."""
    draw = torch.Generator().manual_seed(1)
    x, gate = torch.randn(3, 7, 6, generator=draw), torch.randn(EXPERTS, 6, generator=draw).requires_grad_()
    spec, images = UpcycleSpec(experts=EXPERTS, top_k=2, counting=counting), 0 if rank else 3
    records = []
    for tiles in (1, 4) if images else ():
        logits = x.repeat(tiles, 1, 1).mul(tiles).flatten(0, 1) @ gate.T
        records.append(RouterRecord(0, EXPERTS, logits, logits.topk(2).indices, sequences=3 * tiles))
    losses = image_router_losses(records, images, 2, spec, torch.device("cpu"))
    (losses.balance + losses.z + 0.0 * gate.sum()).backward()
    return {"balance": losses.balance.detach(), "z": losses.z.detach(), "gate": gate.grad}


if __name__ == "__main__":
    number, count = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", rank=number, world_size=count)
    shared = values_of(number, count)
    if number == 0:
        torch.save(shared, Path(sys.argv[3]))
    dist.destroy_process_group()
