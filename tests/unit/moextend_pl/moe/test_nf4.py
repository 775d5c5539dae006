"""Weights in 4 bits: their numbers, and the products they take part in."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moextend_pl.moe.nf4 import NF4Weight, pack, packed_rows, unpack

# QLoRA (arXiv 2305.14314), appendix E.
CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
E, IN, OUT = 3, 16, 24


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantised(weight: Tensor) -> NF4Weight:
    return NF4Weight(*pack(weight), weight.shape, weight.dtype)


def dense(weight: NF4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    return unpack(weight.packed, weight.absmax, weight.shape, dtype)


def nearest_code(weight: Tensor) -> Tensor:
    """The nearest of the paper's sixteen values in each block of 64, scaled by the block's largest magnitude."""
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    return (CODE[(blocks / largest).unsqueeze(-1).sub(CODE).abs().argmin(dim=-1)] * largest).reshape(weight.shape)


@pytest.mark.parametrize("shape", [(8, 32), (E, OUT, IN), (2**12 + 5, 64)], ids=["matrix", "stack", "several pieces"])
def test_numbers_are_the_nearest_of_the_sixteen_of_the_paper(shape: tuple[int, ...]) -> None:
    weight = draw(*shape)
    torch.testing.assert_close(dense(quantised(weight)), nearest_code(weight), atol=1e-6, rtol=0)


def test_each_expert_of_a_stack_is_packed_for_itself() -> None:
    stack = draw(E, OUT, IN)
    packed, absmax = pack(stack)
    for expert in range(E):
        alone = pack(stack[expert])
        assert torch.equal(packed[expert], alone[0])
        assert torch.equal(absmax[expert], alone[1])


def test_packed_weights_take_less_than_a_third_of_sixteen_bits() -> None:
    size = sum(p.numel() * p.element_size() for p in quantised(draw(E, OUT, IN)).parameters())
    assert size / (E * OUT * IN * 2) == 0.28125


def test_block_of_zeros_stays_zero() -> None:
    weight = draw(4, 64)
    weight[1] = 0
    assert not dense(quantised(weight))[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_holds_the_same_numbers(dtype: torch.dtype) -> None:
    weight = quantised(draw(E, OUT, IN))
    assert torch.equal(dense(weight, dtype), dense(weight).to(dtype))


Product = Callable[[Tensor, object], Tensor]
ENDS = torch.tensor([4, 4, 9], dtype=torch.int32)  # no token for the second expert
PRODUCTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Product]] = {
    "linear": ((OUT, IN), (2, 5, IN), F.linear),
    "linear with bias": ((OUT, IN), (5, IN), lambda x, w: F.linear(x, w, torch.ones(OUT))),
    "x @ w": ((IN, OUT), (5, IN), lambda x, w: x @ w),
    "x @ w transposed": ((OUT, IN), (5, IN), lambda x, w: x @ w.transpose(0, 1)),
    "w @ x": ((OUT, IN), (2, IN, 5), lambda x, w: w @ x),
    "linear of one expert": ((E, OUT, IN), (5, IN), lambda x, w: F.linear(x, w[torch.tensor(1)])),
    "x @ one expert": ((E, IN, OUT), (5, IN), lambda x, w: x @ w[2]),
    "grouped over some": (
        (E, OUT, IN),
        (9, IN),
        lambda x, w: F.grouped_mm(x, w[1:].transpose(-2, -1), offs=ENDS[1:]),
    ),
    "chosen experts @ x": ((E, OUT, IN), (4, IN, 1), lambda x, w: torch.bmm(w[torch.tensor([2, 0, 2, 1])], x)),
    "x @ chosen experts": ((E, IN, OUT), (4, 1, IN), lambda x, w: torch.bmm(x, w[torch.tensor([2, 0, 2, 1])])),
    "grouped": ((E, OUT, IN), (9, IN), lambda x, w: F.grouped_mm(x, w.transpose(-2, -1), offs=ENDS)),
    "grouped transposed": ((E, IN, OUT), (9, IN), lambda x, w: F.grouped_mm(x, w, offs=ENDS)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_and_its_gradient_equal_those_of_the_unpacked_weight(name: str) -> None:
    weight_shape, x_shape, multiply = PRODUCTS[name]
    weight, x = quantised(draw(*weight_shape)), draw(*x_shape, seed=1)
    results = []
    for operand in (dense(weight), weight):
        leaf = x.clone().requires_grad_()
        y = multiply(leaf, operand)
        y.backward(draw(*y.shape, seed=2))
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "x @ w", "linear of one expert", "x @ chosen experts"])
def test_gradient_equals_finite_differences(name: str) -> None:
    weight_shape, x_shape, multiply = PRODUCTS[name]
    weight = quantised(draw(*weight_shape))
    torch.autograd.gradcheck(lambda x: multiply(x, weight), draw(*x_shape).double().requires_grad_())


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", PRODUCTS)
def test_backward_keeps_bytes_of_the_weight_itself_and_nothing_unpacked(name: str) -> None:
    weight_shape, x_shape, multiply = PRODUCTS[name]
    weight, kept = quantised(draw(*weight_shape)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        multiply(draw(*x_shape).requires_grad_(), weight)
    floats = [tensor for tensor in kept if tensor.is_floating_point()]
    assert [storage(tensor) for tensor in floats] == [storage(weight.absmax)]
    assert storage(weight.packed) in [storage(tensor) for tensor in kept]


@pytest.mark.parametrize("name", ["linear", "grouped", "linear of one expert"])
def test_no_tokens_give_no_output_and_no_error(name: str) -> None:
    weight_shape, x_shape, multiply = PRODUCTS[name]
    x = torch.zeros(0, x_shape[-1], requires_grad=True)
    offsets_of_nothing = torch.zeros(E, dtype=torch.int32)
    if name == "grouped":
        y = F.grouped_mm(x, quantised(draw(*weight_shape)).transpose(-2, -1), offs=offsets_of_nothing)
    else:
        y = multiply(x, quantised(draw(*weight_shape)))
    y.backward(torch.zeros(0, OUT))
    assert y.shape == (0, OUT)
    assert x.grad.shape == x.shape


def test_nothing_is_kept_where_the_activations_do_not_learn() -> None:
    assert F.linear(draw(5, IN), quantised(draw(OUT, IN))).grad_fn is None


@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_autocast_multiplies_in_its_own_type(name: str) -> None:
    weight_shape, x_shape, multiply = PRODUCTS[name]
    weight, x = quantised(draw(*weight_shape)), draw(*x_shape).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = multiply(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, multiply(x.bfloat16(), dense(weight, torch.bfloat16)))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_linear_layer_and_its_copies_run_as_they_are() -> None:
    layer = nn.Linear(IN, OUT)
    expected = nearest_code(layer.weight.detach())
    weight = quantised(layer.weight)
    del layer.weight
    layer.requires_grad_(False).weight = weight
    for module in (layer, copy.deepcopy(layer)):
        torch.testing.assert_close(module(draw(5, IN)), F.linear(draw(5, IN), expected, layer.bias))
    assert set(layer.state_dict()) == {"bias", "weight.packed", "weight.absmax"}
    assert not any(p.requires_grad for p in weight.parameters())


def test_change_of_type_changes_what_is_computed_and_not_what_is_stored() -> None:
    weight = quantised(draw(E, OUT, IN))
    packed, absmax = weight.packed.clone(), weight.absmax.clone()
    weight.to(torch.bfloat16)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.packed, packed)
    assert torch.equal(weight.absmax, absmax)
    assert weight.absmax.dtype == torch.float32
    weight.to("meta")
    assert (weight.device.type, weight.absmax.dtype, weight.dtype) == ("meta", torch.float32, torch.bfloat16)


def test_operation_that_would_keep_the_unpacked_weight_is_refused() -> None:
    with pytest.raises(TypeError, match="NF4Weight"):
        torch.add(draw(OUT, IN), quantised(draw(OUT, IN)))
    with pytest.raises(TypeError, match="Operand"):
        torch.add(draw(OUT, IN), quantised(draw(E, OUT, IN))[0])


def test_rows_of_experts_come_unpacked_under_the_name_of_the_weight() -> None:
    experts = nn.Module()
    experts.down_proj = quantised(draw(E, IN, OUT))
    experts.act_fn = nn.SiLU()
    rows = packed_rows(experts, (2, 0, 2))
    assert set(rows) == {"down_proj"}
    assert torch.equal(rows["down_proj"], dense(experts.down_proj)[[2, 0, 2]])
    assert packed_rows(nn.Linear(2, 3), (0,)) == {}
