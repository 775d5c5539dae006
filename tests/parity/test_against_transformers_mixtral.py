"""The extended model against transformers' own Mixtral: what must stay equal, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.tiny_world import GROWN, make_plan, perturb, tiny_mixtral
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralForCausalLM

from moextend_pl.moe import dispatch
from moextend_pl.moe.blocks import find_blocks
from moextend_pl.moe.extension.growth import grow, new_parameters, strip
from moextend_pl.moe.extension.reach import Reach

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm", dispatch.FROZEN_EXPERTS]
VOCABULARY = 40
IDS = torch.randint(3, VOCABULARY, (4, 11), generator=torch.Generator().manual_seed(1))
LEFT_PADDED = torch.ones(4, 11, dtype=torch.long)
LEFT_PADDED[1, :4] = 0
LEFT_PADDED[3, :7] = 0
RIGHT_PADDED = LEFT_PADDED.flip(1)


def all_new(model: nn.Module) -> list[nn.Parameter]:
    return [p for parameters in new_parameters(model).values() for p in parameters]


@pytest.fixture(params=IMPLEMENTATIONS)
def stock(request: pytest.FixtureRequest) -> MixtralForCausalLM:
    model = tiny_mixtral(VOCABULARY)
    dispatch.use(model, request.param)
    return model


@pytest.fixture
def extend(stock: MixtralForCausalLM) -> Callable[..., tuple[MixtralForCausalLM, Reach]]:
    def extended(trained: bool = True, **options: object) -> tuple[MixtralForCausalLM, Reach]:
        model, reach = copy.deepcopy(stock), Reach()
        grow(model, make_plan(**options), reach)
        if trained:
            perturb(all_new(model))
        return model, reach

    return extended


@pytest.mark.parametrize("mask", [None, LEFT_PADDED, RIGHT_PADDED], ids=["whole", "left", "right"])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("init", ["copy", "preserving"])
@torch.no_grad()
def test_text_only_logits_are_bit_identical(stock, extend, init: str, trained: bool, mask: Tensor | None) -> None:
    model, reach = extend(trained, init=init)
    reach.set(torch.zeros(4, dtype=torch.bool))
    assert torch.equal(model(IDS, attention_mask=mask).logits, stock(IDS, attention_mask=mask).logits)


@torch.no_grad()
def test_text_only_logits_are_bit_identical_with_gradients_enabled(stock, extend) -> None:
    model, reach = extend()
    reach.set(None)
    with torch.enable_grad():
        logits = model(IDS).logits
    assert torch.equal(logits, stock(IDS).logits)


@torch.no_grad()
def test_text_only_greedy_decoding_gives_the_same_tokens_and_scores(stock, extend) -> None:
    model, reach = extend()
    reach.set(torch.zeros(4, dtype=torch.bool))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    got = model.generate(IDS, attention_mask=LEFT_PADDED, **options)
    expected = stock.generate(IDS, attention_mask=LEFT_PADDED, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.logits) == 6
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))


@torch.no_grad()
def test_open_routing_changes_text_logits(stock, extend) -> None:
    model, reach = extend()
    reach.set(torch.ones(4, dtype=torch.bool))
    assert not torch.allclose(model(IDS).logits, stock(IDS).logits, atol=1e-2)


@torch.no_grad()
def test_text_sequences_of_a_mixed_batch_keep_their_logits(stock, extend) -> None:
    model, reach = extend()
    # Output of this size would show if a single text token reached a new expert.
    perturb(new_parameters(model)["new_experts"], size=100.0)
    is_image = torch.tensor([True, False, True, False])
    reach.set(is_image)
    got, expected = model(IDS, attention_mask=LEFT_PADDED).logits, stock(IDS, attention_mask=LEFT_PADDED).logits
    torch.testing.assert_close(got[~is_image], expected[~is_image], atol=1e-5, rtol=1e-5)
    real = LEFT_PADDED.bool() & is_image[:, None]
    assert not torch.allclose(got[real], expected[real], atol=1e-1)


@torch.no_grad()
def test_only_image_sequences_choose_new_experts(extend) -> None:
    model, reach = extend(init="copy")
    is_image = torch.tensor([True, False, True, False])
    reach.set(is_image)
    chosen: dict[int, Tensor] = {}
    for block in find_blocks(model):
        block.router.register_forward_hook(lambda _m, _i, out, layer=block.layer: chosen.update({layer: out[2]}))
    model(IDS)
    for layer, indices in chosen.items():
        by_sequence = (indices >= 4).reshape(4, 11, -1).any(dim=-1)
        assert not by_sequence[~is_image].any()
        assert by_sequence[is_image].any() == (layer in GROWN)


@torch.no_grad()
def test_plan_without_layers_changes_nothing(stock) -> None:
    model = copy.deepcopy(stock)
    grow(model, make_plan(layers=()), Reach())
    assert torch.equal(model(IDS).logits, stock(IDS).logits)
    assert all_new(model) == []


@torch.no_grad()
def test_stripped_model_is_the_stock_model(stock, extend) -> None:
    model, reach = extend()
    reach.set(torch.ones(4, dtype=torch.bool))
    strip(model)
    assert torch.equal(model(IDS).logits, stock(IDS).logits)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]
    state = model.state_dict()
    assert list(state) == list(stock.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in stock.state_dict().items())


def plain_block(x: Tensor, block: nn.Module, source_rows: Tensor, calibrate: bool) -> Tensor:
    """The paper's block, one token at a time, with new experts appended (Eq. 1-3 and 10).

    Probabilities over all experts, the best K of them, their calibrated gates divided by their sum,
    and the weighted sum of SwiGLU experts.
    """
    router, experts = block.gate, block.experts
    rows = torch.cat([router.base.weight, source_rows])
    up = torch.cat([experts.base.gate_up_proj, experts.new.gate_up_proj])
    down = torch.cat([experts.base.down_proj, experts.new.down_proj])
    result = []
    for token in x:
        probs = torch.softmax(torch.stack([row @ token for row in rows]), dim=0)
        gates = probs
        if calibrate:
            module = router.calibration
            gates = probs + module.out_proj @ F.gelu(module.in_proj @ probs)
        best = sorted(range(len(rows)), key=lambda e: -float(probs[e]))[:2]
        total = sum(gates[e] for e in best)
        y = torch.zeros_like(token)
        for e in best:
            gate, value = (up[e] @ token).chunk(2)
            y = y + gates[e] / total * (down[e] @ (gate * torch.sigmoid(gate) * value))
        result.append(y)
    return torch.stack(result)


@pytest.mark.parametrize("sources", [(1,), (2, 0)], ids=["one new expert", "two new experts"])
@pytest.mark.parametrize("calibration", ["additive", "none"])
@torch.no_grad()
def test_trained_block_obeys_the_equations_of_the_paper(extend, calibration: str, sources: tuple[int, ...]) -> None:
    model, reach = extend(True, sources=sources, init="copy", calibration=calibration)
    reach.set(torch.ones(1, dtype=torch.bool))
    block = model.model.layers[2].mlp
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    expected = plain_block(x, block, block.gate.weight, calibration == "additive")
    torch.testing.assert_close(block(x[None])[0], expected, atol=1e-4, rtol=1e-4)
    assert set(range(4, 4 + len(sources))) <= set(block.gate(x)[2].flatten().tolist())


@torch.no_grad()
def test_copy_initialisation_copies_sources_exactly(extend) -> None:
    model, _ = extend(False, sources=(3, 1), init="copy")
    for layer in GROWN:
        block = model.model.layers[layer].mlp
        for new, source in enumerate((3, 1)):
            assert torch.equal(block.gate.weight[new], block.gate.base.weight[source])
            assert torch.equal(block.experts.new.gate_up_proj[new], block.experts.base.gate_up_proj[source])
            assert torch.equal(block.experts.new.down_proj[new], block.experts.base.down_proj[source])
        assert block.experts.new.down_proj.data_ptr() != block.experts.base.down_proj.data_ptr()


@pytest.mark.parametrize("sources", [(1,), (1, 3), (2, 2)], ids=str)
def test_preserving_initialisation_is_the_base_at_step_zero(stock, extend, sources: tuple[int, ...]) -> None:
    model, reach = extend(False, sources=sources, init="preserving")
    reach.set(torch.ones(4, dtype=torch.bool))
    with torch.no_grad():
        expected = stock(IDS).logits
    logits = model(IDS).logits
    torch.testing.assert_close(logits.detach(), expected, atol=1e-5, rtol=1e-5)
    logits.square().sum().backward()
    for layer in GROWN:
        block = model.model.layers[layer].mlp
        for new in range(1 if sources == (2, 2) else len(sources)):
            assert block.experts.new.down_proj.grad[new].abs().max() > 0
            assert block.gate.weight.grad[new].abs().max() > 0


def test_copy_initialisation_is_not_the_base_at_step_zero(stock, extend) -> None:
    model, reach = extend(False, init="copy")
    reach.set(torch.ones(4, dtype=torch.bool))
    assert not torch.allclose(model(IDS).logits, stock(IDS).logits, atol=1e-2)
