"""Frozen and new gated experts as one operation: each byte is moved once, and only new experts get weight gradients.

An operation of torch with a backward pass of its own, so that `torch.compile` and pretended tensors take it as one
node. What the backward pass keeps for each slot is the output of the first projection; the activation is computed
again, and the gradient of a routing weight is `<activation, dy down>`, for which no output of `down` is needed. Tokens
are kept only where new experts learn, and get a gradient only where something before them learns.

Shapes: T tokens, K selected per token, S = T * K slots sorted by expert, D width, I width of the activation, H = 2 I,
E frozen experts, N new ones, M = E + N, R tiles of slots.

The layout of the products follows ScatterMoE (https://arxiv.org/abs/2403.08245) and SonicMoE
(https://arxiv.org/abs/2512.14080); the code is our own.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from moextend_pl.moe.kernels.order import Order, order_slots

HAS_TRITON = find_spec("triton") is not None
ON_ANY_DEVICE = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels, on a CPU too; it asks once, when it is imported."""


def fits(experts: Any) -> bool:
    """Returns whether kernels can compute experts where Triton is installed: plain gates, SiLU, no bias, no packing."""
    plain = getattr(experts, "has_gate", False) and getattr(experts, "is_concatenated", True)
    if not plain or experts.is_transposed or experts.has_bias:
        return False
    if getattr(experts, "has_post_expert_norm", False) or type(experts)._apply_gate is not _default_apply_gate:
        return False
    weights = [experts._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    if not all(isinstance(weight, nn.Parameter) and weight.is_contiguous() for weight in weights):
        return False  # packed in 4 bits, or a view that kernels would read in another order
    if any(isinstance(weight, DTensor) for weight in weights):
        return False
    return isinstance(experts.act_fn, (nn.SiLU, SiLUActivation))


def gated_experts(
    x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, frozen: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
) -> Tensor:
    """Computes the weighted sum of the selected experts.

    Args:
        x_TD: Tokens.
        indices_TK: Selected experts; M and above are skipped.
        weights_TK: Routing weights.
        frozen: `gate_up` (E, H, D) and `down` (E, D, I) of frozen experts, which get no gradient.
        new: The same of new ones, with N of 0 where there are none.

    Returns:
        (T, D) in the dtype of `x_TD`.
    """
    order = order_slots(indices_TK, len(frozen[0]) + len(new[0]))
    kept = x_TD.to(frozen[0].dtype).contiguous()
    y_TD: Tensor = _forward(kept, weights_TK.contiguous(), list(frozen), list(new), list(order))[0]
    return y_TD.to(x_TD.dtype)


@torch.library.custom_op("moextend::gated_experts", mutates_args=())
def _forward(
    x_TD: Tensor, weights_TK: Tensor, frozen: list[Tensor], new: list[Tensor], order: list[Tensor]
) -> tuple[Tensor, Tensor]:
    from moextend_pl.moe.kernels import launch

    sorted_ = Order(*order)
    projected_SH, activated_SI = launch.gate_up(x_TD, frozen[0], new[0], sorted_)
    out_SD = launch.product(activated_SI, frozen[1], new[1], sorted_, transposed=True)
    return launch.sum_slots(out_SD, weights_TK, sorted_), projected_SH


@_forward.register_fake
def _(x_TD: Tensor, weights_TK: Tensor, frozen: list[Tensor], *_: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), x_TD.new_empty(weights_TK.numel(), frozen[0].shape[1])


@torch.library.custom_op("moextend::gated_experts_backward", mutates_args=())
def _backward(
    dy_TD: Tensor, x_TD: Tensor | None, weights_TK: Tensor, projected_SH: Tensor,
    frozen: list[Tensor], new: list[Tensor], order: list[Tensor], onwards: bool,
) -> list[Tensor]:  # fmt: skip
    """Returns the gradients of routing weights, of tokens if `onwards`, and of new experts if tokens are given."""
    from moextend_pl.moe.kernels import launch

    sorted_, E = Order(*order), len(frozen[0])
    d_SI = launch.product(dy_TD, frozen[1], new[1], sorted_, transposed=False, gather=True)
    # A token selects an expert once at most.
    room = 0 if x_TD is None else len(x_TD) * min(len(new[0]), weights_TK.shape[1])
    dprojected_SH, dweights_TK, activated_UI = launch.activation_gradient(
        d_SI, projected_SH, weights_TK, sorted_, E, room
    )
    del d_SI
    gradients = [dweights_TK]
    if onwards:
        dx_SD = launch.product(dprojected_SH, frozen[0], new[0], sorted_, transposed=False)
        gradients.append(launch.sum_slots(dx_SD, None, sorted_))
        del dx_SD
    if x_TD is not None:
        gradients.append(launch.weight_gradient(dprojected_SH, x_TD, sorted_, new[0], E, gathered="right"))
        gradients.append(launch.weight_gradient(dy_TD, activated_UI, sorted_, new[1], E, gathered="left"))
    return gradients


@_backward.register_fake
def _(
    dy_TD: Tensor, x_TD: Tensor | None, weights_TK: Tensor, projected_SH: Tensor,  # noqa: ARG001
    frozen: list[Tensor], new: list[Tensor], order: list[Tensor], onwards: bool,  # noqa: ARG001
) -> list[Tensor]:  # fmt: skip
    like = [weights_TK, *([dy_TD] if onwards else []), *(new if x_TD is not None else [])]
    return [torch.empty_like(one) for one in like]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, weights_TK, frozen, new, order = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros are written for the projection's, as large as what is kept
    learns = any(stack.requires_grad for stack in new)
    ctx.save_for_backward(x_TD if learns else None, weights_TK, output[1], *frozen, *new, *order)


def _differentiate(ctx: Any, dy_TD: Tensor | None, _: Any) -> tuple[Any, ...]:
    x_TD, weights_TK, projected_SH, *stacks = ctx.saved_tensors
    frozen, new, order = stacks[:2], stacks[2:4], stacks[4:]
    onwards = ctx.needs_input_grad[0]
    if dy_TD is None:  # what comes after has no gradient
        dy_TD = projected_SH.new_zeros(len(weights_TK), frozen[1].shape[1])
    dweights_TK, *rest = _backward(dy_TD.contiguous(), x_TD, weights_TK, projected_SH, frozen, new, order, onwards)
    dx_TD = rest.pop(0) if onwards else None
    return dx_TD, dweights_TK, [None, None], rest or [None, None], [None] * len(order)


_forward.register_autograd(_differentiate, setup_context=_keep)
