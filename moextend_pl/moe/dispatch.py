"""Computes frozen experts for what a frozen base needs: gradients of tokens and routing weights, and no others.

transformers' `grouped_mm` keeps for the backward pass what weight gradients would need, and runs through
the slots of other devices. Here one node of the autograd graph holds the output of the first projection
and the order of the slots; the activation is computed again, and the gradient of a routing weight is
taken where the output of the second projection is not needed:
`<expert(x), dy> = <activation, dy down>`.

Shapes: T tokens, K selected per token, S = T * K slots, R slots of experts of this module, D width,
E experts, H width of the first projection, I width of the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from moextend_pl.moe.kernels.calibrated_routing import calibrated_routing, suits
from moextend_pl.moe.kernels.gated_experts import HAS_TRITON, ON_ANY_DEVICE, fits, gated_experts
from moextend_pl.moe.routing import Scoring

FROZEN_EXPERTS = "moextend"
"""Name under which transformers knows `frozen_experts_forward` once it was registered."""

KERNEL_EXPERTS = "moextend_triton"
"""The same, with kernels in 32 bits too, and on a CPU where `TRITON_INTERPRET=1` is set."""

PARALLEL_EXPERTS = "moextend_parallel"
"""Name of the same where each rank holds a part of the experts; set by what cuts them, not by a user."""

OURS = (FROZEN_EXPERTS, KERNEL_EXPERTS, PARALLEL_EXPERTS)

# Slots computed at a time on a CPU: what one chunk makes is still in the cache when it is read. Among 256 to 8192,
# 512 was fastest or level for 8 wide experts (`benchmarks/block.py`).
CHUNK_SLOTS = 512

# Rows by which the groups of a product in 16 bits grow on a CPU.
STEP_ROWS = 64


def use(model: PreTrainedModel, implementation: str) -> None:
    """Sets how a model computes its experts; makes `moextend` known to transformers first.

    Args:
        model: A transformers model.
        implementation: `moextend`, or any that transformers has.
    """
    register()
    model.set_experts_implementation(implementation)


def implementations() -> list[str]:
    """Returns the names of all ways to compute experts."""
    register()
    return sorted({"eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()})


def register() -> None:
    """Makes `moextend` known to transformers, by its public registry."""
    ALL_EXPERTS_FUNCTIONS.register(FROZEN_EXPERTS, frozen_experts_forward)
    ALL_EXPERTS_FUNCTIONS.register(KERNEL_EXPERTS, frozen_experts_forward)


def frozen_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Computes the weighted sum of the selected experts, on a CPU as transformers' `grouped_mm` does, bit for bit.

    On a GPU kernels compute plain gated experts. Experts that learn, that have biases or a norm behind them, and
    passes in which tokens need no gradient are left to transformers, and so are passes that `torch.compile` traces.

    Args:
        self: Experts module of a transformers model.
        hidden_states: (T, D).
        top_k_index: (T, K); E and above are skipped.
        top_k_weights: (T, K).

    Returns:
        (T, D).
    """
    if by_kernels(self, hidden_states.device):
        return kernel_experts(self, None, hidden_states, top_k_index, top_k_weights)
    if not _is_frozen_here(self, hidden_states):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    output: Tensor = _FrozenExperts.apply(hidden_states, top_k_weights, top_k_index, self)
    return output


def by_kernels(experts: Any, device: torch.device) -> bool:
    """Returns whether kernels compute a base's experts on a device: `meant_for_kernels`, and Triton is installed."""
    return HAS_TRITON and meant_for_kernels(experts, device)


def meant_for_kernels(experts: Any, device: torch.device) -> bool:
    """Returns whether kernels are to compute a base's experts on a device: set so, plain, frozen, 16 bits on a GPU.

    In 32 bits the products of libraries are faster.
    """
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if implementation not in OURS or not fits(experts):
        return False
    by_default = device.type == "cuda" and experts.down_proj.dtype.itemsize == 2
    by_name = implementation == KERNEL_EXPERTS and (device.type == "cuda" or ON_ANY_DEVICE)
    return (by_default or by_name) and not any(parameter.requires_grad for parameter in experts.parameters())


def kernel_experts(
    frozen: Any, new: tuple[Tensor, Tensor] | None, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Computes frozen experts, and new ones behind them, in one pass of kernels.

    Args:
        frozen: Experts module of a base, of E experts, for which `by_kernels` holds.
        new: First and second projection of N new experts, or None.
        x_TD: Tokens.
        indices_TK: Selected among E + N experts; what is above is skipped.
        weights_TK: Routing weights.
    """
    old = (frozen.gate_up_proj, frozen.down_proj)
    nobody = (old[0][:0], old[1][:0])
    return gated_experts(x_TD, indices_TK, weights_TK, old, nobody if new is None else new)


def routed_by_kernels(experts: Any, scoring: Scoring, total: int, device: torch.device) -> bool:
    """Returns whether a kernel also selects among `total` experts, old and new: where kernels compute them, plainly."""
    return suits(scoring, total) and by_kernels(experts, device)


def kernel_routing(*arguments: Any, **how: Any) -> tuple[Tensor, Tensor]:
    """Selects and weighs experts by a kernel, see `calibrated_routing`."""
    return calibrated_routing(*arguments, **how)


def takes(experts: Any) -> bool:
    """Returns whether the backward pass of an experts module is that of this file: set so, frozen, without biases."""
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    has_norm = getattr(experts, "has_post_expert_norm", False)  # unknown to transformers 5.17
    if implementation not in OURS or experts.has_bias or has_norm:
        return False
    return not any(parameter.requires_grad for parameter in experts.parameters())


def _is_frozen_here(experts: Any, x_TD: Tensor) -> bool:
    # Where only the routing weights need a gradient, in the first layer that learns, keeping the outputs is cheapest.
    needed = torch.is_grad_enabled() and x_TD.requires_grad
    return needed and not torch.compiler.is_compiling() and takes(experts)


def _first_weight(experts: Any) -> Tensor:
    return experts.gate_up_proj if experts.has_gate else experts.up_proj


def _activation(experts: Any) -> Callable[[Tensor], Tensor]:
    return experts._apply_gate if experts.has_gate else experts.act_fn


def _spans(offsets_E: Tensor, slots: int) -> list[tuple[slice, slice]]:
    """Cuts the experts into runs of about `CHUNK_SLOTS` slots; on a GPU one run, as reading offsets would wait."""
    if offsets_E.device.type != "cpu":
        return [(slice(0, len(offsets_E)), slice(0, slots))]
    spans, expert, row, ends = [], 0, 0, offsets_E.tolist()
    for e, end in enumerate(ends):
        if e + 1 == len(ends) or ends[e + 1] - row > CHUNK_SLOTS:
            if end > row:
                spans.append((slice(expert, e + 1), slice(row, end)))
            expert, row = e + 1, end
    return spans


class _FrozenExperts(torch.autograd.Function):
    """The node of the graph; the weights are read from the module again in the backward pass, never saved."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, experts: Any) -> Tensor:
        first_EHD, down_EDI, activation = _first_weight(experts), experts.down_proj, _activation(experts)
        experts_S, perm_S = torch.sort(indices_TK.reshape(-1))
        numbers_E = torch.arange(len(first_EHD), device=x_TD.device)
        offsets_E = torch.searchsorted(experts_S, numbers_E, right=True, out_int32=True)
        # On a GPU the slots of other modules stay in, as the sum below never reads them.
        rows = int(offsets_E[-1]) if x_TD.device.type == "cpu" else len(perm_S)
        perm_R = perm_S[:rows]
        slots_TK = torch.empty_like(perm_S).scatter_(0, perm_S, torch.arange(len(perm_S), device=x_TD.device))
        slots_TK = slots_TK.view_as(indices_TK).masked_fill(indices_TK >= len(first_EHD), rows)

        tokens_R = perm_R // indices_TK.shape[-1]
        # The last row is the zero that slots of other modules add.
        out_RD = first_EHD.new_empty(rows + 1, x_TD.shape[-1])
        out_RD[rows:] = 0.0
        projected = []
        for members, slots in _spans(offsets_E, rows):
            offsets = offsets_E[members] - slots.start
            h = _project(x_TD.index_select(0, tokens_R[slots]), first_EHD[members], offsets, not experts.is_transposed)
            out_RD[slots] = _project(activation(h), down_EDI[members], offsets, not experts.is_transposed)
            projected.append(h)
        ctx.experts = experts
        ctx.save_for_backward(weights_TK, perm_R, slots_TK, offsets_E, *projected)
        return sum_slots(out_RD, slots_TK, weights_TK).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        weights_TK, perm_R, slots_TK, offsets_E, *projected = ctx.saved_tensors
        experts, needs_weights = ctx.experts, ctx.needs_input_grad[1]
        first_EHD, down_EDI, activation = _first_weight(experts), experts.down_proj, _activation(experts)
        rows = len(perm_R)
        tokens_R, weights_S = perm_R // weights_TK.shape[-1], weights_TK.reshape(-1)
        dweights_S = torch.empty_like(weights_S)
        dx_RD = down_EDI.new_empty(rows + 1, dy_TD.shape[-1])
        dx_RD[rows:] = 0.0
        for h_saved, (members, slots) in zip(projected, _spans(offsets_E, rows), strict=True):
            offsets = offsets_E[members] - slots.start
            d = _project(dy_TD.index_select(0, tokens_R[slots]), down_EDI[members], offsets, experts.is_transposed)
            with torch.enable_grad():
                h = h_saved.detach().requires_grad_()
                a = activation(h)
            if needs_weights:
                dweights_S[perm_R[slots]] = (a.detach() * d).sum(dim=-1, dtype=weights_S.dtype)
            d *= weights_S[perm_R[slots]].unsqueeze(-1)
            (dh,) = torch.autograd.grad(a, h, d)
            dx_RD[slots] = _project(dh, first_EHD[members], offsets, experts.is_transposed)
        dweights_TK = dweights_S.view_as(weights_TK).masked_fill(slots_TK == rows, 0.0) if needs_weights else None
        return sum_slots(dx_RD, slots_TK, None).to(dy_TD.dtype), dweights_TK, None, None


def _project(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """Multiplies each group of rows by its expert's matrix, or by the matrix transposed."""
    x, matrices = x.to(weight.dtype), weight.transpose(-2, -1) if transposed else weight
    if x.device.type == "cpu" and x.dtype.itemsize == 2:
        return _by_steps(x, matrices, offsets)
    return F.grouped_mm(x, matrices, offs=offsets)


def _by_steps(x_RD: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Multiplies groups in whole steps of rows, those of the next group with them, which are left out again.

    In 16 bits oneDNN makes a kernel for every number of rows, and groups are hardly ever twice as long.
    """
    out, row = x_RD.new_empty(len(x_RD), matrices.shape[-1]), 0
    for end, matrix in zip(offsets.tolist(), matrices, strict=True):
        whole = -(-(end - row) // STEP_ROWS) * STEP_ROWS
        rows = x_RD[row : row + whole]
        if len(rows) < whole:
            rows = F.pad(rows, (0, 0, 0, whole - len(rows)))
        if whole:
            out[row:end] = (rows @ matrix)[: end - row]
        row = end
    return out


def sum_slots(rows_RD: Tensor, slots_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Adds up the rows of each token's slots, weighted or not; on a CPU a few tokens at a time."""
    step = max(CHUNK_SLOTS // slots_TK.shape[-1], 1) if rows_RD.device.type == "cpu" else max(len(slots_TK), 1)
    dtype = rows_RD.dtype if weights_TK is None else torch.promote_types(rows_RD.dtype, weights_TK.dtype)
    sum_TD = rows_RD.new_empty(len(slots_TK), rows_RD.shape[-1], dtype=dtype)
    for first in range(0, len(slots_TK), step):
        span = slice(first, first + step)
        # Several times as fast as indexing.
        picked_TKD = rows_RD.index_select(0, slots_TK[span].flatten()).unflatten(0, (-1, slots_TK.shape[-1]))
        if weights_TK is not None:
            picked_TKD = picked_TKD * weights_TK[span].unsqueeze(-1)
        torch.sum(picked_TKD, dim=1, out=sum_TD[span])
    return sum_TD
