"""Frozen experts: the same numbers as transformers, the gradients a frozen base needs, and little kept for them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_world import TinyWorld, make_plan, perturb, tiny_mixtral
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import grouped_mm_experts_forward, use_experts_implementation

from moextend_pl.moe import dispatch
from moextend_pl.moe.dispatch import FROZEN_EXPERTS, frozen_experts_forward
from moextend_pl.moe.extension.growth import grow, new_parameters
from moextend_pl.moe.extension.reach import Reach

TOKENS, TOP_K, EXPERTS, WIDTH, INNER = 37, 2, 5, 16, 24


def toy_experts(gated: bool = True, transposed: bool = False, biased: bool = False) -> nn.Module:
    """Frozen experts of the layouts that transformers knows."""

    @use_experts_implementation(has_gate=gated, is_transposed=transposed, has_bias=biased)
    class Toy(nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, nn.GELU() if gated else nn.ReLU()
            first = (EXPERTS, INNER * (2 if gated else 1), WIDTH)
            shapes = {"gate_up_proj" if gated else "up_proj": first, "down_proj": (EXPERTS, WIDTH, INNER)}
            for name, (e, rows, columns) in shapes.items():
                shape = (e, columns, rows) if transposed else (e, rows, columns)
                self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.3))
                if biased:
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(e, rows)))

        def forward(self, *_: Tensor) -> Tensor:
            raise NotImplementedError

    return Toy(SimpleNamespace(_experts_implementation=FROZEN_EXPERTS)).requires_grad_(False)


def routed(dtype: torch.dtype = torch.float32, sentinels: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, indices and weights; expert 3 gets no token, and a part of the slots belongs to others."""
    allowed = torch.tensor([0, 1, 2, 4, EXPERTS] if sentinels else [0, 1, 2, 4])
    indices = allowed[torch.rand(TOKENS, len(allowed)).topk(TOP_K).indices]
    return (
        torch.randn(TOKENS, WIDTH, dtype=dtype),
        indices,
        torch.rand(TOKENS, TOP_K).masked_fill(indices == EXPERTS, 0),
    )


def run(forward: object, experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output and the gradients of tokens and weights, for a fixed random loss."""
    x, weights = inputs[0].clone().requires_grad_(), inputs[2].clone().requires_grad_()
    y = forward(experts, x, inputs[1], weights)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return y.detach(), x.grad, weights.grad


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("chunk", [1, 11, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sentinels", [False, True])
def test_output_is_that_of_transformers_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype, sentinels: bool
) -> None:
    monkeypatch.setattr(dispatch, "CHUNK_SLOTS", chunk)
    experts, inputs = toy_experts().to(dtype), routed(dtype, sentinels)
    experts._is_expert_parallel = sentinels
    assert torch.equal(
        run(frozen_experts_forward, experts, inputs)[0], run(grouped_mm_experts_forward, experts, inputs)[0]
    )


@pytest.mark.parametrize("chunk", [1, 11, 2048])
def test_gradients_equal_those_of_a_plain_loop_in_double_precision(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(dispatch, "CHUNK_SLOTS", chunk)
    experts, (x, indices, _) = toy_experts(), routed()
    weights = torch.rand(TOKENS, TOP_K)  # slots of other modules are skipped whatever their weight
    got = run(frozen_experts_forward, experts, (x, indices, weights))

    def loop(_: nn.Module, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for token, chosen in enumerate(indices.tolist()):
            row = torch.zeros(WIDTH, dtype=torch.double)
            for k, e in enumerate(chosen):
                if e < EXPERTS:
                    gate, up = (experts.gate_up_proj[e].double() @ x[token]).chunk(2)
                    row = row + weights[token, k] * (experts.down_proj[e].double() @ (F.gelu(gate) * up))
            rows.append(row)
        return torch.stack(rows)

    expected = run(loop, experts, (x.double(), indices, weights.double()))
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value.double(), reference, atol=1e-5, rtol=1e-5)
    assert not got[2][indices == EXPERTS].any()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_every_layout_has_the_gradients_of_transformers(gated: bool, transposed: bool, biased: bool) -> None:
    experts, inputs = toy_experts(gated, transposed, biased), routed()
    experts._is_expert_parallel = True
    expected = run(grouped_mm_experts_forward, experts, inputs)
    for value, reference in zip(run(frozen_experts_forward, experts, inputs), expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-5)


def test_half_precision_gradients_are_as_near_to_single_precision_as_those_of_transformers() -> None:
    experts, inputs = toy_experts(), routed(sentinels=False)
    exact = run(grouped_mm_experts_forward, experts, inputs)
    experts, inputs = experts.to(torch.bfloat16), (inputs[0].bfloat16(), *inputs[1:])
    ours = run(frozen_experts_forward, experts, inputs)
    theirs = run(grouped_mm_experts_forward, experts, inputs)
    for value, other, reference in zip(ours, theirs, exact, strict=True):
        assert (value.float() - reference).norm() < 1.5 * (other.float() - reference).norm()


def test_products_in_16_bits_have_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: set[int] = set()
    monkeypatch.setattr(dispatch, "STEP_ROWS", 16)
    multiply = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda one, other: rows.add(len(one)) or multiply(one, other))
    groups = torch.tensor([5, 5, 40, 61])
    x, weight = torch.randn(61, WIDTH).bfloat16(), torch.randn(4, WIDTH, INNER).bfloat16()
    found = dispatch._project(x, weight, groups.to(torch.int32), transposed=False)
    assert rows == {16, 32, 48}
    monkeypatch.undo()
    assert torch.equal(found, F.grouped_mm(x, weight, offs=groups.to(torch.int32)))


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["tokens only", "weights only"])
def test_what_needs_no_gradient_gets_none(needed: tuple[bool, bool]) -> None:
    experts, (x, indices, weights) = toy_experts(), routed(sentinels=False)
    expected = run(frozen_experts_forward, experts, (x, indices, weights))[1:]
    inputs = [tensor.clone().requires_grad_(need) for tensor, need in zip((x, weights), needed, strict=True)]
    y = frozen_experts_forward(experts, inputs[0], indices, inputs[1])
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    for tensor, need, reference in zip(inputs, needed, expected, strict=True):
        if need:
            torch.testing.assert_close(tensor.grad, reference, atol=1e-5, rtol=1e-5)
        else:
            assert tensor.grad is None


def test_learning_experts_are_left_to_transformers() -> None:
    experts, inputs = toy_experts().requires_grad_(True), routed(sentinels=False)
    run(frozen_experts_forward, experts, inputs)
    ours = [parameter.grad.clone() for parameter in experts.parameters()]
    experts.zero_grad()
    run(grouped_mm_experts_forward, experts, inputs)
    for gradient, parameter in zip(ours, experts.parameters(), strict=True):
        assert gradient.any()
        assert torch.equal(gradient, parameter.grad)


def test_no_token_at_all_is_no_error() -> None:
    experts = toy_experts()
    x = torch.randn(0, WIDTH, requires_grad=True)
    y = frozen_experts_forward(experts, x, torch.zeros(0, TOP_K, dtype=torch.long), torch.zeros(0, TOP_K))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, WIDTH)


def saved(forward: object, experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[int, Tensor]:
    """Returns the storages that the backward pass of a call keeps, apart from those of parameters."""
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(experts, inputs[0].clone().requires_grad_(), inputs[1], inputs[2].clone().requires_grad_())
    return kept


def test_a_backward_pass_keeps_the_first_projection_and_the_order_of_the_slots_only() -> None:
    experts, inputs = toy_experts(), routed(sentinels=False)
    sizes = [t.untyped_storage().nbytes() for t in saved(frozen_experts_forward, experts, inputs).values()]
    slots = TOKENS * TOP_K
    projection, order, weights = slots * 2 * INNER * 4, 2 * slots * 8, slots * 4
    assert sum(sizes) == projection + order + weights + EXPERTS * 4
    learning = toy_experts().requires_grad_(True)
    theirs = sum(t.untyped_storage().nbytes() for t in saved(grouped_mm_experts_forward, learning, inputs).values())
    assert sum(sizes) < 0.7 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_of_frozen_experts_answers_and_learns_as_transformers_does(dtype: torch.dtype) -> None:
    ids = torch.randint(3, 40, (2, 9))
    results = []
    for implementation in (FROZEN_EXPERTS, "grouped_mm"):
        model = tiny_mixtral().to(dtype).requires_grad_(False)
        dispatch.use(model, implementation)
        embeddings = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embeddings).logits
        logits.float().logsumexp(-1).sum().backward()
        results.append((logits.detach(), embeddings.grad))
    assert torch.equal(results[0][0], results[1][0])
    if dtype == torch.float32:
        torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-4)


def test_folder_of_a_model_does_not_name_the_implementation(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = tiny_world.language(experts_implementation=FROZEN_EXPERTS)
    model.save_pretrained(tmp_path)
    assert FROZEN_EXPERTS not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


@pytest.mark.slow
def test_compiled_extended_model_answers_and_learns_as_it_does_uncompiled() -> None:
    model, reach = tiny_mixtral(num_hidden_layers=1).requires_grad_(False), Reach()
    dispatch.use(model, FROZEN_EXPERTS)
    grow(model, make_plan([0]), reach)
    new = [parameter for parameters in new_parameters(model).values() for parameter in parameters]
    perturb(new, size=0.2)
    reach.set(torch.ones(2, dtype=torch.bool))
    embeddings, results = torch.randn(2, 9, 32), []
    for run_model in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        x = embeddings.clone().requires_grad_()
        logits = run_model(inputs_embeds=x, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        results.append([logits.detach(), x.grad, *(parameter.grad for parameter in new)])
    for compiled, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)
