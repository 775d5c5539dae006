"""Growing a model by a plan, naming what is new, and taking it off again."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_world import EXPERTS, GROWN, LAYERS, make_plan, tiny_mixtral
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from moextend_pl.contracts import ExtensionPlan, LayerGrowth, UserError
from moextend_pl.moe.blocks import expert_count, find_blocks
from moextend_pl.moe.extension.extended_router import ExtendedRouter
from moextend_pl.moe.extension.growth import grow, new_parameters, router_parameters, strip
from moextend_pl.moe.extension.reach import Reach


def snapshot(model: nn.Module) -> tuple[list[tuple[str, type]], dict[str, torch.Tensor]]:
    return [(n, type(m)) for n, m in model.named_modules()], {n: t.clone() for n, t in model.state_dict().items()}


def unchanged(model: nn.Module, before: tuple[list[tuple[str, type]], dict[str, torch.Tensor]]) -> bool:
    modules, state = before
    now = model.state_dict()
    return [(n, type(m)) for n, m in model.named_modules()] == modules and all(
        torch.equal(now[name], tensor) for name, tensor in state.items()
    )


def test_blocks_are_found_in_order_of_their_layers() -> None:
    blocks = find_blocks(tiny_mixtral())
    assert [block.layer for block in blocks] == list(range(LAYERS))
    assert [block.path for block in blocks] == [f"model.layers.{layer}.mlp" for layer in range(LAYERS)]
    assert {block.router_name for block in blocks} == {"gate"}
    assert {block.num_experts for block in blocks} == {EXPERTS}


def test_blocks_of_a_grown_model_are_found_with_their_new_size() -> None:
    model = tiny_mixtral()
    grow(model, make_plan([1], (0, 3)), Reach())
    assert {block.layer: block.num_experts for block in find_blocks(model)} == {0: 4, 1: 6, 2: 4}


def test_model_without_experts_is_refused() -> None:
    dense = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9))
    with pytest.raises(UserError, match=r"Expected a mixture-of-experts model.*got GPT2LMHeadModel"):
        find_blocks(dense)


def test_expert_count_is_zero_for_anything_else() -> None:
    assert expert_count(nn.Linear(2, 2)) == 0
    odd = nn.Linear(2, 2)
    odd.num_experts = 4
    assert expert_count(odd) == 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (make_plan([0, 7]), r"among the mixture-of-experts layers \[0, 1, 2\], got 7"),
        (make_plan([0, 1], (EXPERTS,)), "Layer 0 has 4 experts, the plan asks to copy expert 4"),
        (
            ExtensionPlan(layers=(LayerGrowth(0, (1,)), LayerGrowth(2, (0, 9)))),
            "Layer 2 has 4 experts, the plan asks to copy expert 9",
        ),
    ],
    ids=["no such layer", "no such source", "later layer wrong"],
)
def test_plan_that_does_not_fit_is_refused_and_changes_nothing(plan: ExtensionPlan, message: str) -> None:
    model = tiny_mixtral()
    before = snapshot(model)
    with pytest.raises(UserError, match=message):
        grow(model, plan, Reach())
    assert unchanged(model, before)


def test_second_growth_counts_the_first_among_its_sources() -> None:
    model, first, second = tiny_mixtral(), Reach(), Reach()
    grow(model, make_plan([2]), first)
    before = snapshot(model)
    with pytest.raises(UserError, match=rf"Layer 0 has {EXPERTS} experts, the plan asks to copy expert {EXPERTS}"):
        grow(model, make_plan([0], (EXPERTS,)), second)
    assert unchanged(model, before)
    grow(model, make_plan([2], (EXPERTS, 1)), second)
    parts = new_parameters(model, latest=second)
    new_first, new_second = parts["earlier_extensions"], parts["new_experts"]
    assert [len(p) for p in new_second] == [2, 2]
    assert any(torch.equal(p[:1], new_second[0][:1]) for p in new_first if p.shape[1:] == new_second[0].shape[1:])


def test_growth_keeps_every_tensor_of_the_base_in_place() -> None:
    model = tiny_mixtral()
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    grow(model, make_plan(), Reach())
    after = {name.replace(".base.", "."): p for name, p in model.named_parameters() if ".base." in name}
    after |= {name: p for name, p in model.named_parameters() if name in before and name not in after}
    for name, parameter in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, values[name])


def test_stripped_model_is_as_before_and_can_grow_again() -> None:
    model = tiny_mixtral()
    before = snapshot(model)
    grow(model, make_plan(), Reach())
    assert not unchanged(model, before)
    strip(model)
    assert unchanged(model, before)
    # The experts of transformers 5.17 do not have the flag before they are wrapped.
    assert not any(getattr(block.experts, "_is_expert_parallel", False) for block in find_blocks(model))
    strip(model)
    grow(model, make_plan([1]), Reach())
    assert isinstance(find_blocks(model)[1].router, ExtendedRouter)


@pytest.mark.parametrize("calibration", ["additive", "none"])
def test_new_parameters_are_exactly_those_the_base_lacks(calibration: str) -> None:
    base_names = {name for name, _ in tiny_mixtral().named_parameters()}
    model = tiny_mixtral()
    grow(model, make_plan(sources=(1, 2), calibration=calibration), Reach())
    parts = new_parameters(model)
    got = [id(p) for parameters in parts.values() for p in parameters]
    rows = {f"model.layers.{layer}.mlp.gate.weight" for layer in GROWN}  # the base's are now at `gate.base.weight`
    expected = {id(p) for n, p in model.named_parameters() if n in rows or n.replace(".base.", ".") not in base_names}
    assert set(got) == expected
    assert len(got) == len(set(got))
    sizes = {name: sum(p.numel() for p in parameters) for name, parameters in parts.items()}
    layers, new, width, inner = len(GROWN), 2, 32, 24
    assert sizes["new_experts"] == layers * new * 3 * width * inner
    assert sizes["new_routers"] == layers * new * width
    each = 2 * (EXPERTS + new) * 2 * EXPERTS
    assert sizes["calibration"] == (layers * each if calibration == "additive" else 0)


def test_model_that_is_not_grown_has_no_new_parameters() -> None:
    assert set(map(len, new_parameters(tiny_mixtral()).values())) == {0}


def test_router_parameters_are_the_base_rows_grown_or_not() -> None:
    model = tiny_mixtral()
    before = router_parameters(model)
    assert [tuple(p.shape) for p in before] == [(EXPERTS, 32)] * LAYERS
    grow(model, make_plan(), Reach())
    assert [id(p) for p in router_parameters(model)] == [id(p) for p in before]


def test_calibration_of_each_layer_has_its_own_seed() -> None:
    model = tiny_mixtral()
    grow(model, make_plan(seed=5), Reach())
    first, second = new_parameters(model)["calibration"][0], new_parameters(model)["calibration"][2]
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def test_model_grows_alike_where_the_default_type_is_half() -> None:
    model, half = tiny_mixtral(), tiny_mixtral()
    grow(model, make_plan(), Reach())
    torch.set_default_dtype(torch.bfloat16)
    try:
        grow(half, make_plan(), Reach())
    finally:
        torch.set_default_dtype(torch.float32)
    facts = [[b.router.facts for b in find_blocks(m) if isinstance(b.router, ExtendedRouter)] for m in (model, half)]
    assert facts[0] == facts[1]
