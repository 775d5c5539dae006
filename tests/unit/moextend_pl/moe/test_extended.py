"""Router and experts with new members, apart from any model."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_world import EXPERTS, TinyWorld, make_plan, perturb, tiny_mixtral
from torch import nn

from moextend_pl.moe import dispatch
from moextend_pl.moe.extension.extended_experts import ExtendedExperts, sprout
from moextend_pl.moe.extension.extended_router import ExtendedRouter, open_tokens
from moextend_pl.moe.extension.growth import grow, new_parameters
from moextend_pl.moe.extension.reach import Reach
from moextend_pl.moe.touch import touch


def test_no_sequence_is_reached_unless_declared() -> None:
    reach = Reach()
    assert reach.nowhere
    reach.set(torch.tensor([False, True]))
    assert not reach.nowhere
    reach.set(torch.tensor([False, False]))
    assert reach.nowhere
    reach.set(torch.tensor([True]))
    reach.set(None)
    assert reach.nowhere


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (6, [1, 1, 1, 0, 0, 0]),  # a prompt of three tokens
        (2, [1, 0]),  # one cached decoding step
        (4, [1, 1, 0, 0]),  # a decoding step of two beams for each prompt
    ],
)
def test_mask_by_token_holds_for_prompts_steps_and_beams(tokens: int, expected: list[int]) -> None:
    reach = Reach()
    reach.set(torch.tensor([True, False]))
    assert reach.tokens(tokens).int().tolist() == expected


def test_tokens_that_do_not_divide_into_sequences_are_refused() -> None:
    reach = Reach()
    reach.set(torch.tensor([True, False]))
    with pytest.raises(AssertionError, match="3 tokens do not divide into the 2 sequences"):
        reach.tokens(3)


def test_touch_is_a_zero_that_gives_every_learning_parameter_a_gradient() -> None:
    learning, frozen = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4), requires_grad=False)
    zero = touch([learning, frozen])
    assert zero.item() == 0.0
    zero.backward()
    assert learning.grad is not None
    assert not learning.grad.any()
    assert frozen.grad is None
    assert touch([frozen]) is None
    with torch.no_grad():
        assert touch([learning]) is None


def grown_block(init: str = "copy", sources: tuple[int, ...] = (1,)) -> tuple[nn.Module, Reach]:
    model, reach = tiny_mixtral().requires_grad_(False), Reach()
    grow(model, make_plan([0], sources, init=init), reach)
    return model.model.layers[0].mlp.train(), reach


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "moextend"])
@pytest.mark.parametrize("sources", [(1,), (1, 0, 2)])
@pytest.mark.parametrize("mask", [(True, True), (False, True), (False, False)])
def test_shapes_that_no_value_decides_give_what_the_counted_slots_give(
    monkeypatch: pytest.MonkeyPatch, implementation: str, sources: tuple[int, ...], mask: tuple[bool, bool]
) -> None:
    """On a GPU and under a compiler every token has a slot for each new expert; on a CPU only those that chose one."""
    model, reach = tiny_mixtral().requires_grad_(False), Reach()
    dispatch.use(model, implementation)
    grow(model, make_plan([0], sources, init="copy"), reach)
    perturb([p for parameters in new_parameters(model).values() for p in parameters], size=0.2)
    block = model.model.layers[0].mlp.train()
    x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        reach.set(torch.tensor(mask), somewhere=True)
        block.zero_grad()
        tokens = x.clone().requires_grad_()
        y = block(tokens)
        y.square().sum().backward()
        results.append([y.detach(), tokens.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
    for static, counted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(static, counted, atol=1e-5, rtol=1e-4)


def test_base_parameters_get_no_gradient_and_new_ones_do() -> None:
    block, reach = grown_block()
    reach.set(torch.ones(2, dtype=torch.bool))
    block(torch.randn(2, 30, 32)).square().sum().backward()
    gradients = {name: parameter.grad is not None for name, parameter in block.named_parameters()}
    assert gradients == {name: ".base." not in name for name in gradients}
    assert sum(gradients.values()) == 5


@pytest.mark.parametrize("experts", [4, 6, 8, 60])
@pytest.mark.parametrize("tokens", [1, 17, 256])
def test_a_fresh_copy_ties_with_its_source_exactly_so_that_it_wins_every_place_of_it(experts: int, tokens: int) -> None:
    model, reach = tiny_mixtral(num_local_experts=experts).requires_grad_(False), Reach()
    grow(model, make_plan([0], (1, 2), init="preserving"), reach)
    router = model.model.layers[0].mlp.gate
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
    logits = router.logits(x)
    assert logits.shape == (tokens, experts + 2)
    assert torch.equal(logits[:, experts:], logits[:, 1:3])
    reach.set(torch.ones(1, dtype=torch.bool))
    _, _, indices = router(x)
    _, _, old = router.base(x)
    assert torch.equal(indices, torch.where((old == 1) | (old == 2), old + experts - 1, old))


def test_new_expert_that_no_token_reaches_has_zero_gradients() -> None:
    block, reach = grown_block()
    reach.set(torch.ones(2, dtype=torch.bool))
    # Whatever the router says, the new expert is never chosen.
    block.gate.register_forward_hook(lambda _m, _i, out: (out[0], out[1], out[2].clamp(max=EXPERTS - 1)))
    block(torch.randn(2, 5, 32)).square().sum().backward()
    for parameter in block.experts.new.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("mask", [None, [False, False]], ids=["undeclared", "text only"])
def test_every_new_parameter_has_a_zero_gradient_where_no_sequence_is_open(mask: list[bool] | None) -> None:
    block, reach = grown_block()
    reach.set(None if mask is None else torch.tensor(mask))
    x = torch.randn(2, 5, 32, requires_grad=True)
    block(x).square().sum().backward()
    new = [p for name, p in block.named_parameters() if ".base." not in name]
    assert len(new) == 5
    for parameter in new:
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_router_tells_closed_tokens_the_base_result_exactly() -> None:
    block, reach = grown_block(init="copy")
    perturb(list(block.gate.parameters()), size=1.0)
    reach.set(torch.tensor([False, True]))
    x = torch.randn(10, 32)
    logits, weights, indices = block.gate(x)
    base_logits, base_weights, base_indices = block.gate.base(x)
    assert logits.shape == (10, EXPERTS + 1)
    assert torch.equal(logits[:, :EXPERTS], base_logits)
    assert torch.equal(weights[:5], base_weights[:5])
    assert torch.equal(indices[:5], base_indices[:5])
    assert not torch.equal(weights[5:], base_weights[5:])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_sprout_computes_as_its_sources_do(implementation: str) -> None:
    model = tiny_mixtral()
    model.set_experts_implementation(implementation)
    base = model.model.layers[0].mlp.experts
    new = sprout(base, [2, 0])
    x = torch.randn(6, 32)
    weights = torch.rand(6, 1)
    for index, source in enumerate([2, 0]):
        got = new(x, torch.full((6, 1), index), weights)
        torch.testing.assert_close(got, base(x, torch.full((6, 1), source), weights))
    assert base.num_experts == EXPERTS
    assert len(base.gate_up_proj) == EXPERTS


def test_hooks_of_old_experts_are_not_those_of_new_ones() -> None:
    base, heard = tiny_mixtral().model.layers[0].mlp.experts, []
    new = sprout(base, [2])
    base.register_forward_hook(lambda *_: heard.append("old"))
    new(torch.randn(3, 32), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    assert heard == []


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_with_two_new_members_equal_one_stack_of_all(implementation: str) -> None:
    model, reach = tiny_mixtral().requires_grad_(False), Reach()
    model.set_experts_implementation(implementation)
    grow(model, make_plan([0], (1, 1)), reach)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, ExtendedExperts)
    assert experts.num_experts == EXPERTS + 2
    perturb(list(experts.new.parameters()))
    reach.set(torch.ones(1, dtype=torch.bool))
    stack = tiny_mixtral(num_local_experts=EXPERTS + 2).model.layers[0].mlp.experts
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(stack, name).copy_(torch.cat([getattr(experts.base, name), getattr(experts.new, name)]))
    x, indices, weights = torch.randn(20, 32), torch.rand(20, 6).topk(2).indices, torch.rand(20, 2)
    torch.testing.assert_close(experts(x, indices, weights), stack(x, indices, weights), atol=1e-5, rtol=1e-5)


def test_router_names_its_new_parameters() -> None:
    block, _ = grown_block()
    assert isinstance(block.gate, ExtendedRouter)
    names = block.gate.new_parameters()
    assert names["new_routers"][0] is block.gate.weight
    assert {id(p) for p in names["calibration"]} == {id(p) for p in block.gate.calibration.parameters()}


@torch.no_grad()
def test_cached_decoding_of_a_mixed_batch_equals_decoding_without_cache(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(init="copy"))
    perturb([p for parameters in new_parameters(model.language.model).values() for p in parameters])
    batch = tiny_world.batch(model, "itti", generation=True)
    assert not batch["attention_mask"].all()  # prompts of different lengths, padded on the left
    lm = model.language
    embeddings, mask = model.embed(batch), batch["attention_mask"]
    lm.set_reach(batch)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = lm.model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
    slow = []
    for _ in range(6):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = lm.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits[:, -1]
        slow.append(logits.argmax(-1))
        embeddings = torch.cat([embeddings, lm.embed(slow[-1][:, None])], dim=1)
        mask = torch.cat([mask, mask.new_ones(4, 1)], dim=1)
    assert torch.equal(cached, torch.stack(slow, dim=1))


@torch.no_grad()
def test_beam_search_keeps_text_sequences_as_they_are(tiny_world: TinyWorld) -> None:
    model, stock = tiny_world.model(make_plan(init="copy")), tiny_world.stock()
    perturb([p for parameters in new_parameters(model.language.model).values() for p in parameters], size=2.0)
    batch = tiny_world.batch(model, "tti", generation=True)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"inputs_embeds": model.embed(batch), "attention_mask": batch["attention_mask"]}
    model.language.set_reach(batch)
    got, expected = model.language.model.generate(**options), stock.generate(**options)
    assert torch.equal(got[:2], expected[:2])
    assert not torch.equal(got[2], expected[2])


def test_training_mode_of_a_grown_block_leaves_its_frozen_router_in_evaluation() -> None:
    block, _ = grown_block()
    assert block.train().gate.training
    assert not any(module.training for module in block.gate.base.modules())


def test_token_that_either_of_two_extensions_opens_is_open() -> None:
    model, first, second = tiny_mixtral(), Reach(), Reach()
    grow(model, make_plan([0]), first)
    grow(model, make_plan([0]), second)
    router = model.model.layers[0].mlp.gate
    first.set(torch.tensor([True, False, False]))
    second.set(torch.tensor([False, True, False]))
    assert open_tokens(router, torch.zeros(3)).tolist() == [True, True, False]
    second.set(None)
    assert open_tokens(router, torch.zeros(3)).tolist() == [True, False, False]
