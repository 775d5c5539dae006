"""Every mixture-of-experts family of the installed transformers is extended exactly, or refused with a reason."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import family_table
from helpers.family_table import extendable
from helpers.tiny_families import EXPERTS, TOP_K, VOCABULARY, families, tiny_model
from torch import Tensor

from moextend_pl.contracts import ExtensionPlan, LayerGrowth, UserError
from moextend_pl.moe.blocks import find_blocks
from moextend_pl.moe.extension.growth import grow, new_parameters, strip
from moextend_pl.moe.extension.reach import Reach
from moextend_pl.moe.families import read_facts, sort_output

# Why a family, or some of its layers, cannot be extended. Every other family must pass everything below.
REFUSED = {
    "gemma4": "its logits are not a product of hidden state and one weight matrix",
    "inkling": "router has not one row for each",
    "zaya": "router has not one row for each",
}
PARTLY = {"deepseek_v4": "depends on more than the token's hidden state"}
NAMED = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "olmoe",
    "flex_olmo",
    "granitemoe",
    "granitemoeshared",
    "granitemoehybrid",
    "phimoe",
    "minimax",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "dots1",
    "ernie4_5_moe",
    "gpt_oss",
    "hunyuan_v1_moe",
    "lfm2_moe",
    "jamba",
    "mistral4",
    "afmoe",
]
SOURCE = 3
LENGTH, ROWS = 9, 4
WITH_IMAGE = torch.tensor([True, False, True, False])
PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def supported() -> list[Any]:
    """Returns the families to test; those that nobody asked for by name run with the slow tests."""
    return [
        pytest.param(name, marks=() if name in NAMED else pytest.mark.slow)
        for name in families()
        if name not in REFUSED
    ]


every_family = pytest.mark.parametrize("family", supported())


def ids(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


def logits(model: Any, input_ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids() if input_ids is None else input_ids, use_cache=False).logits
    return result


def extended(
    model: Any, init: str = "preserving", calibration: str = "additive", sources: tuple[int, ...] = (SOURCE,)
) -> tuple[Any, Reach]:
    """Grows every layer of a copy of a model that can grow."""
    grown, reach = copy.deepcopy(model), Reach()
    layers = tuple(LayerGrowth(block.layer, sources) for block in extendable(model))
    grow(grown, ExtensionPlan(layers=layers, init=init, calibration=calibration), reach)
    return grown, reach


def shake(model: Any, seed: int = 2) -> None:
    """Moves every new weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameters in new_parameters(model).values():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def chosen(model: Any, input_ids: Tensor) -> dict[int, Tensor]:
    """Returns the experts that each layer's router selects."""
    found: dict[int, Tensor] = {}
    handles = [
        block.router.register_forward_hook(
            lambda _m, _i, out, layer=block.layer: found.update({layer: sort_output(out).indices})
        )
        for block in find_blocks(model)
    ]
    logits(model, input_ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(scope="module", autouse=True)
def _one_model_at_a_time() -> Iterator[None]:
    yield
    _STOCK.clear()


_STOCK: dict[str, Any] = {}


def stock(family: str) -> Any:
    """Returns the unchanged tiny model; it must not be written to."""
    if family not in _STOCK:
        _STOCK.clear()
        _STOCK[family] = tiny_model(family)
    return _STOCK[family]


def test_families_asked_for_by_name_are_all_here() -> None:
    assert set(NAMED) <= set(families())
    assert len(set(families()) - set(REFUSED)) >= 40


@every_family
def test_zero_new_experts_equal_the_stock_model(family: str) -> None:
    model, reach = copy.deepcopy(stock(family)), Reach()
    grow(model, ExtensionPlan(layers=()), reach)
    reach.set(WITH_IMAGE)
    assert torch.equal(logits(model), logits(stock(family)))


@every_family
def test_masked_text_is_bit_identical_whatever_was_learned(family: str) -> None:
    model, reach = extended(stock(family))
    shake(model)
    expected = logits(stock(family))
    assert torch.equal(logits(model), expected)
    reach.set(WITH_IMAGE)
    got = logits(model)
    assert not torch.allclose(got[WITH_IMAGE], expected[WITH_IMAGE], atol=1e-4)
    reach.set(None)
    assert torch.equal(logits(model), expected)


@every_family
def test_preserving_start_is_the_stock_model_on_images_and_learns(family: str) -> None:
    model, reach = extended(stock(family), sources=(SOURCE, 0))
    reach.set(torch.ones(ROWS, dtype=torch.bool))
    torch.testing.assert_close(logits(model), logits(stock(family)), atol=2e-5, rtol=1e-4)
    picked = torch.cat([index.flatten() for index in chosen(model, ids()).values()])
    assert (picked >= EXPERTS).any(), "no token reached a new expert"
    model.requires_grad_(False)
    parts = new_parameters(model)
    for parameter in (learning := parts["new_experts"] + parts["new_routers"]):
        parameter.requires_grad_(True)
    model(input_ids=ids(), use_cache=False).logits.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learning)
    for name in ("new_experts", "new_routers"):
        assert any(parameter.grad.abs().sum() > 0 for parameter in parts[name]), name


def with_one_expert_more(family: str, model: Any) -> Any:
    """Returns the family's own model of E + 1 experts whose last one is a copy of the source."""
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS + 1)
    larger, old = tiny_model(family, n_group=1, num_expert_group=1, **counts), model.state_dict()
    new = {}
    for name, tensor in larger.state_dict().items():
        rows = old[name]
        grown = tensor.shape != rows.shape
        dim = next((d for d in range(tensor.dim()) if tensor.shape[d] != rows.shape[d]), 0)
        new[name] = torch.cat([rows, rows.narrow(dim, SOURCE, 1)], dim) if grown else rows
    larger.load_state_dict(new)
    return larger


@every_family
def test_copied_expert_competes_as_one_more_expert_of_the_family(family: str) -> None:
    model = tiny_model(family, n_group=1, num_expert_group=1)
    grown, reach = extended(model, init="copy", calibration="none")
    larger = with_one_expert_more(family, model)
    reach.set(torch.ones(ROWS, dtype=torch.bool))
    generator = torch.Generator().manual_seed(7)
    own = {block.layer: block for block in extendable(larger)}
    # Moved off the tie with its source, where rounding would decide.
    for block in find_blocks(grown):
        if block.layer in own:
            router, twin = block.router, own[block.layer].router
            rows = torch.randn(router.weight.shape, generator=generator) * 0.3
            facts: Any = router.facts
            with torch.no_grad():
                router.weight.copy_(rows)
                dict(twin.named_parameters())[facts.weight][-1:] = rows
    torch.testing.assert_close(logits(grown), logits(larger), atol=2e-5, rtol=1e-4)
    picked = torch.cat([index.flatten() for index in chosen(grown, ids()).values()])
    assert (picked == EXPERTS).any(), "no token reached the new expert"


@every_family
def test_expert_without_tokens_has_a_zero_gradient(family: str) -> None:
    model, reach = extended(stock(family))
    model.requires_grad_(False)
    learning = [p for part in new_parameters(model).values() for p in part]
    for parameter in learning:
        parameter.requires_grad_(True)
    for mask in (None, torch.ones(1, dtype=torch.bool)):
        reach.set(mask)
        one = ids(rows=1, length=1)
        model(input_ids=one, use_cache=False).logits.float().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)
        if mask is None:
            assert all(p.grad.abs().sum() == 0 for p in learning if p.grad is not None)


@every_family
def test_generation_with_a_cache_equals_generation_without(family: str) -> None:
    model, reach = extended(stock(family))
    shake(model)
    reach.set(WITH_IMAGE)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids())
    cached = model.generate(input_ids=ids(), attention_mask=mask, use_cache=True, **options)
    plain = ids()
    for _ in range(4):
        plain = torch.cat([plain, logits(model, plain)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(cached, plain)
    reach.set(None)
    stock_tokens = stock(family).generate(input_ids=ids(), attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached[~WITH_IMAGE], stock_tokens[~WITH_IMAGE])


@every_family
def test_new_weights_load_into_a_new_model_and_come_off_again(family: str) -> None:
    model, reach = extended(stock(family))
    shake(model)
    new = {id(parameter) for part in new_parameters(model).values() for parameter in part}
    delta = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in new}
    again, other_reach = extended(tiny_model(family))
    again.load_state_dict(delta, strict=False)
    for one in (reach, other_reach):
        one.set(WITH_IMAGE)
    assert torch.equal(logits(again), logits(model))
    strip(model)
    assert torch.equal(logits(model), logits(stock(family)))
    assert list(model.state_dict()) == list(stock(family).state_dict())


@every_family
def test_second_extension_leaves_the_first_as_it_was(family: str) -> None:
    first, reach = extended(stock(family), sources=(SOURCE, 1))
    shake(first)
    second, other = copy.deepcopy(first), Reach()
    inner = next(m.reach for m in second.modules() if hasattr(m, "reach"))
    layers = tuple(LayerGrowth(block.layer, (EXPERTS, 2)) for block in extendable(stock(family)))
    grow(second, ExtensionPlan(layers=layers), other)
    for one in (reach, inner):
        one.set(WITH_IMAGE)
    expected = logits(first)
    other.set(WITH_IMAGE)
    torch.testing.assert_close(logits(second), expected, atol=2e-5, rtol=1e-4)
    shake(second, seed=3)
    # Its own shake moved the first extension's weights too: put them back, as they are frozen in training.
    for module, source in zip(
        (m for m in second.modules() if getattr(m, "reach", None) is inner),
        (m for m in first.modules() if getattr(m, "reach", None) is reach),
        strict=True,
    ):
        with torch.no_grad():
            for group, old in zip(module.new_parameters().values(), source.new_parameters().values(), strict=True):
                for parameter, value in zip(group, old, strict=True):
                    parameter.copy_(value)
    assert not torch.allclose(logits(second)[WITH_IMAGE], expected[WITH_IMAGE], atol=1e-4)
    other.set(None)
    assert torch.equal(logits(second), expected)
    for one in (reach, inner):
        one.set(None)
    assert torch.equal(logits(second), logits(stock(family)))
    strip(second)
    assert list(second.state_dict()) == list(stock(family).state_dict())


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_family_that_cannot_be_extended_is_refused_with_the_reason(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(UserError, match=REFUSED[family]):
        grow(model, ExtensionPlan(layers=(LayerGrowth(1, (0,)),)), Reach())


@pytest.mark.parametrize("family", sorted(PARTLY))
def test_layer_that_cannot_be_extended_is_refused_with_the_reason(family: str) -> None:
    model = tiny_model(family)
    layers = {block.layer for block in find_blocks(model)} - {block.layer for block in extendable(model)}
    assert layers
    with pytest.raises(UserError, match=PARTLY[family]):
        grow(model, ExtensionPlan(layers=(LayerGrowth(min(layers), (0,)),)), Reach())


def page() -> str:
    text: str = PAGE.read_text(encoding="utf-8")
    return text


@pytest.mark.parametrize("family", [name for name in sorted(families()) if name in {*NAMED, *REFUSED, *PARTLY}])
def test_docs_state_the_measured_facts_of_the_family(family: str) -> None:
    assert family_table.row(family) in page().splitlines()


def test_a_refusal_in_the_docs_says_what_the_code_says() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| refused: (.*?) \|", page(), re.MULTILINE))
    assert set(rows) == set(REFUSED)
    assert all(REFUSED[family] in text for family, text in rows.items())


@pytest.mark.slow
def test_docs_hold_the_whole_table() -> None:
    if f"of transformers {transformers.__version__} can" in page():
        assert family_table.table() in page(), "run `make families`"
    else:  # a family of another release may be missing in the table, or be in it alone
        rows = [family_table.row(family) for family in families() if f"| {family} " in page()]
        assert set(rows) <= set(page().splitlines())


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "flex_olmo", "qwen3_moe", "gpt_oss", "phimoe"])
def test_facts_of_a_router_that_selects_all_experts_are_those_of_one_that_selects_some(family: str) -> None:
    some, every = tiny_model(family), tiny_model(family, num_experts_per_tok=EXPERTS)
    facts = [read_facts(find_blocks(model)[0].router, EXPERTS) for model in (some, every)]
    assert facts[0] == facts[1]


def test_layers_selected_in_groups_refuse_a_copy_that_competes_with_all() -> None:
    with pytest.raises(UserError, match="init: preserving"):
        extended(tiny_model("deepseek_v3"), init="copy")


def test_top_k_of_the_tiny_models_leaves_experts_out() -> None:
    assert TOP_K < EXPERTS
