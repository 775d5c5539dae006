"""Tokens that travel to experts on other ranks: the numbers and gradients of a rank that holds all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from helpers.threads import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.integrations.moe import use_experts_implementation

from moextend_pl.contracts import UserError
from moextend_pl.moe.dispatch import PARALLEL_EXPERTS, frozen_experts_forward
from moextend_pl.moe.parallel.cut import check_cut, cut, is_cut
from moextend_pl.moe.parallel.exchange import parallel_experts_forward
from moextend_pl.runs.fingerprints import tensor_sha256

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Forward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
RANKS, EXPERTS, TOP_K, WIDTH, INNER = 3, 6, 2, 8, 12
TOKENS = (7, 0, 4)


def toy_experts(transposed: bool = False, biased: bool = False) -> nn.Module:
    @use_experts_implementation(is_transposed=transposed, has_bias=biased)
    class Toy(nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, nn.SiLU()
            for name, rows, columns in (("gate_up_proj", 2 * INNER, WIDTH), ("down_proj", WIDTH, INNER)):
                shape = (EXPERTS, columns, rows) if transposed else (EXPERTS, rows, columns)
                self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.3))
                if biased:
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, rows)))

        def forward(self, *_: Tensor) -> Tensor:
            raise NotImplementedError

    torch.manual_seed(0)
    made = Toy(SimpleNamespace(_experts_implementation=PARALLEL_EXPERTS)).requires_grad_(False)
    made._is_expert_parallel = True  # as inside of an extension: the index E is nobody's
    return made


def inputs_of(rank: int, experts: list[int]) -> Inputs:
    """Tokens, indices, weights and a gradient of the output; some slots are nobody's."""
    draw = torch.Generator().manual_seed(rank)
    tokens = TOKENS[rank]
    chosen = torch.tensor([*experts, EXPERTS])
    indices = chosen[torch.rand(tokens, len(chosen), generator=draw).topk(TOP_K).indices]
    weights = torch.rand(tokens, TOP_K, generator=draw).masked_fill(indices == EXPERTS, 0.0)
    x, dy = (torch.randn(tokens, WIDTH, generator=draw) for _ in range(2))
    return x, indices, weights, dy


def computed(forward: Forward, experts: nn.Module, inputs: Inputs, learns: tuple[bool, bool]) -> list[Tensor]:
    """Returns the output, and the gradients of tokens and weights, zero where they need none."""
    x, indices, weights, dy = (value.clone() for value in inputs)
    x.requires_grad_(learns[0])
    weights.requires_grad_(learns[1])
    y = forward(experts, x, indices, weights)
    if y.requires_grad:
        y.backward(dy)
    return [y.detach(), *(torch.zeros_like(v) if v.grad is None else v.grad for v in (x, weights))]


# All experts; those of the first rank alone, so that no token comes to the others; none at all.
@pytest.mark.parametrize("chosen", [list(range(EXPERTS)), [0, 1], [EXPERTS]], ids=["all", "of one rank", "none"])
@pytest.mark.parametrize(
    "learns",
    [[(True, True)] * 3, [(False, False), (True, True), (False, True)], [(False, False)] * 3],
    ids=["all learn", "some learn", "none learns"],
)
def test_numbers_are_those_of_all_experts_in_one_place(chosen: list[int], learns: list[tuple[bool, bool]]) -> None:
    whole = toy_experts()

    def work(rank: int) -> list[Tensor]:
        experts = copy.deepcopy(whole)
        cut(experts, init_device_mesh("cpu", (RANKS,)))
        return computed(parallel_experts_forward, experts, inputs_of(rank, chosen), learns[rank])

    for rank, got in enumerate(on_ranks(RANKS, work)):
        expected = computed(frozen_experts_forward, whole, inputs_of(rank, chosen), learns[rank])
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("transposed", "biased"), [(True, False), (False, True)])
def test_layouts_of_other_families_travel_too(transposed: bool, biased: bool) -> None:
    whole = toy_experts(transposed, biased)

    def work(rank: int) -> list[Tensor]:
        experts = copy.deepcopy(whole)
        cut(experts, init_device_mesh("cpu", (RANKS,)))
        return computed(parallel_experts_forward, experts, inputs_of(rank, list(range(EXPERTS))), (True, True))

    for rank, got in enumerate(on_ranks(RANKS, work)):
        expected = computed(frozen_experts_forward, whole, inputs_of(rank, list(range(EXPERTS))), (True, True))
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)


def test_rank_holds_its_experts_alone_and_their_fingerprint_is_that_of_all() -> None:
    whole = toy_experts()

    def work(rank: int) -> tuple[int, str]:
        experts = copy.deepcopy(whole)
        cut(experts, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "ranks")))
        assert is_cut(experts)
        return experts.down_proj.to_local().untyped_storage().nbytes(), tensor_sha256(experts.down_proj)

    sizes, prints = zip(*on_ranks(4, work), strict=True)
    assert set(sizes) == {whole.down_proj.nbytes // 2}
    assert set(prints) == {tensor_sha256(whole.down_proj)}


def test_experts_that_are_whole_are_computed_where_they_are() -> None:
    whole, inputs = toy_experts(), inputs_of(0, [0, 1, 2])
    expected = computed(frozen_experts_forward, whole, inputs, (True, True))
    for one, other in zip(expected, computed(parallel_experts_forward, whole, inputs, (True, True)), strict=True):
        assert torch.equal(one, other)


class _OfTheirOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.weight = 4, nn.Parameter(torch.zeros(4, 2, 2), requires_grad=False)


def test_experts_that_cannot_be_shared_are_refused() -> None:
    experts = toy_experts()
    with pytest.raises(UserError, match="among which the 6 experts of a layer of Toy divide, got 4"):
        check_cut(experts, 4, "Toy")
    with pytest.raises(UserError, match="called by code of their own"):
        check_cut(_OfTheirOwn(), 2, "Toy")
    with pytest.raises(UserError, match="that learn are not shared"):
        check_cut(experts.requires_grad_(True), 2, "Toy")
