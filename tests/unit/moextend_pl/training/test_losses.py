"""Losses of one process, against torch and plain loops, and of two processes against one."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import shared_losses
from helpers.balance_loop import loop_balance
from torch import Tensor
from torch.nn import functional as F

from moextend_pl.contracts import COUNTINGS, IGNORE_INDEX, UpcycleSpec
from moextend_pl.moe.usage import RouterRecord
from moextend_pl.training.losses import balance_loss, global_mean, image_router_losses, router_z_loss, token_loss

ROOT = Path(__file__).parents[4]


def record(layer: int, experts: int, seed: int, tokens: int = 12) -> RouterRecord:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return RouterRecord(layer, experts, logits, logits.topk(2).indices)


def test_token_loss_equals_torchs_mean_and_ignores_unlearned_positions() -> None:
    logits, labels = torch.randn(6, 9, requires_grad=True), torch.tensor([1, IGNORE_INDEX, 8, 0, IGNORE_INDEX, 2])
    got = token_loss(logits, labels)
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, wanted)


def test_token_loss_of_nothing_is_zero_and_differentiable() -> None:
    logits = torch.zeros(0, 9, requires_grad=True)
    loss = token_loss(logits, torch.zeros(0, dtype=torch.long))
    assert loss.item() == 0.0
    loss.backward()


def test_token_loss_of_half_precision_is_taken_in_single() -> None:
    logits, labels = torch.randn(4, 9).bfloat16(), torch.tensor([1, 2, 3, 4])
    assert token_loss(logits, labels).dtype == torch.float32
    torch.testing.assert_close(token_loss(logits, labels), F.cross_entropy(logits.float(), labels))


def test_mean_of_no_items_is_zero() -> None:
    assert global_mean(torch.tensor(0.0), torch.tensor(0)).item() == 0.0


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (6, 3)])
def test_balance_of_uniform_routing_is_the_number_of_choices(experts: int, top_k: int) -> None:
    indices = torch.tensor([[(t + k) % experts for k in range(top_k)] for t in range(experts)])
    uniform = RouterRecord(0, experts, torch.zeros(experts, experts), indices)
    assert balance_loss([uniform], [torch.ones(experts, dtype=torch.bool)]).item() == pytest.approx(top_k)


def test_balance_uses_each_layers_own_number_of_experts_and_ignores_padding() -> None:
    records = [record(0, 4, 0), record(1, 5, 1), record(2, 4, 2)]
    masks = [torch.rand(12, generator=torch.Generator().manual_seed(n)) < 0.6 for n in range(3)]
    expected = sum(loop_balance(r, m) for r, m in zip(records, masks, strict=True)) / 3
    assert balance_loss(records, masks).item() == pytest.approx(expected, abs=1e-5)


def test_balance_pulls_tokens_away_from_a_crowded_expert() -> None:
    logits = torch.zeros(8, 4)
    logits[:, 0] = 1.0
    logits.requires_grad_()
    loss = balance_loss([RouterRecord(0, 4, logits, logits.topk(1).indices)], [torch.ones(8, dtype=torch.bool)])
    loss.backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_balance_of_layers_where_no_token_counts_is_finite() -> None:
    loss = balance_loss([record(0, 4, 0)], [torch.zeros(12, dtype=torch.bool)])
    assert loss.item() == 0.0


def test_first_choices_alone_are_counted_on_demand_and_give_one_when_uniform() -> None:
    one = record(0, 4, 0)
    first = RouterRecord(0, 4, one.logits, one.indices[:, :1])
    masks = [torch.ones(12, dtype=torch.bool)]
    assert balance_loss([one], masks, choices=1).item() == pytest.approx(loop_balance(first, masks[0]), abs=1e-6)


def test_z_loss_is_the_mean_square_of_the_log_of_the_sum_over_counted_tokens() -> None:
    records, masks = [record(0, 4, 0), record(1, 5, 1)], [torch.arange(12) < 7, torch.arange(12) > 3]
    means = [
        sum(math.log(sum(map(math.exp, row))) ** 2 for row in r.logits[m].tolist()) / int(m.sum())
        for r, m in zip(records, masks, strict=True)
    ]
    assert router_z_loss(records, masks).item() == pytest.approx(sum(means) / 2, rel=1e-5)


@pytest.mark.parametrize("counting", COUNTINGS)
def test_uniform_routing_of_images_has_balance_one(counting: str) -> None:
    spec = UpcycleSpec(experts=4, top_k=2, counting=counting)
    indices = torch.tensor([[t % 4, (t + 1) % 4] for t in range(8)])
    uniform = RouterRecord(0, 4, torch.zeros(8, 4), indices, sequences=2)
    losses = image_router_losses([uniform], 2, 1, spec, torch.device("cpu"))
    assert losses.balance.item() == pytest.approx(1.0)
    assert losses.z.item() == pytest.approx(math.log(4) ** 2)


def test_counting_by_image_and_over_the_batch_differ_where_images_use_different_experts() -> None:
    # Each image uses one expert for all of its tokens, and together they use all alike.
    logits = torch.eye(4).repeat_interleave(5, 0) * 4
    crowded = RouterRecord(0, 4, logits, logits.topk(1).indices, sequences=4)
    by_image, by_batch = (
        image_router_losses([crowded], 4, 1, UpcycleSpec(4, 1, counting=counting), torch.device("cpu")).balance.item()
        for counting in COUNTINGS
    )
    probs = torch.tensor([4.0, 0, 0, 0]).softmax(0)
    assert by_image == pytest.approx(4 * float(probs[0]))
    assert by_batch == pytest.approx(1.0)


def values_of_two_processes(folder: Path) -> dict[str, Tensor]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, shared_losses.__file__]
    out = folder / "values.pt"
    ranks = [subprocess.Popen([*command, str(rank), "2", str(out)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
def test_two_processes_have_loss_and_gradients_of_one_on_the_joined_batch(tmp_path: Path) -> None:
    one, two = shared_losses.values_of(rank=0, world=1), values_of_two_processes(tmp_path)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, msg=lambda text, name=name: f"{name}: {text}")
