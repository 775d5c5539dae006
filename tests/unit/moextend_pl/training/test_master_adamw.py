"""AdamW in half precision against torch's own in fp32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from moextend_pl.training.master_adamw import MasterAdamW
from moextend_pl.training.optim import FusedAdamW, OptimSpec, build_optimizer

OPTIONS = {"lr": 2e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}


def gradients(steps: int, shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(steps)]


def weight() -> nn.Parameter:
    return nn.Parameter((torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16())


def take(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: list[Tensor]) -> None:
    for gradient in steps:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def test_master_follows_adamw_in_single_precision() -> None:
    half, single = weight(), nn.Parameter(weight().detach().float())
    optimizer = MasterAdamW([half], **OPTIONS)
    take(optimizer, half, gradients(50, (6, 5)))
    take(AdamW([single], **OPTIONS), single, gradients(50, (6, 5)))
    torch.testing.assert_close(optimizer.state[half]["master"], single.detach())
    assert torch.equal(half.detach(), single.detach().bfloat16())


def test_steps_that_half_precision_rounds_away_add_up() -> None:
    steps = [torch.ones(6, 5)] * 200
    start, plain, kept = weight().detach(), weight(), weight()
    take(AdamW([plain], lr=2e-6, weight_decay=0.0), plain, steps)
    take(MasterAdamW([kept], lr=2e-6, betas=(0.9, 0.999), weight_decay=0.0), kept, steps)
    large = start.abs() > 0.01
    assert torch.equal(plain.detach()[large], start[large])
    torch.testing.assert_close(
        (start - kept.detach())[large].float(), torch.full((int(large.sum()),), 4e-4), atol=1e-4, rtol=0
    )


def test_continued_state_gives_the_same_numbers() -> None:
    steps = gradients(20, (6, 5))
    whole, cut = weight(), weight()
    take(MasterAdamW([whole], **OPTIONS), whole, steps)
    first = MasterAdamW([cut], **OPTIONS)
    take(first, cut, steps[:9])
    saved = copy.deepcopy(first.state_dict())
    second = MasterAdamW([cut], **OPTIONS)
    second.load_state_dict(saved)
    assert second.state[cut]["master"].dtype == torch.float32
    take(second, cut, steps[9:])
    assert torch.equal(whole.detach(), cut.detach())


def test_state_read_to_the_cpu_goes_on_where_the_parameters_are() -> None:
    here = weight()
    first = MasterAdamW([here], **OPTIONS)
    take(first, here, gradients(2, (6, 5)))
    # The meta device stands for a GPU: the fused update cannot read a counter that stayed on the CPU.
    there = nn.Parameter(weight().to("meta"))
    second = MasterAdamW([there], **OPTIONS)
    second.load_state_dict(first.state_dict())
    assert {name: value.device.type for name, value in second.state[there].items()} == dict.fromkeys(
        ("step", "master", "exp_avg", "exp_avg_sq"), "meta"
    )


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, FusedAdamW), (torch.bfloat16, MasterAdamW)])
def test_stage_takes_the_optimizer_that_its_precision_needs(dtype: torch.dtype, kind: type) -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer, _ = build_optimizer([parameter], OptimSpec(), total_steps=3)
    assert type(optimizer) is kind
