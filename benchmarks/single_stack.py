"""The block with old experts and the new one in one contiguous stack: what would it gain over two calls?

A variant that the package does not have. The new expert is the first of the stack, so that one grouped product serves
all experts forward and one towards the tokens, and its weight gradients need the first rows alone; it learns through
a view of its place. Such a stack cannot be sharded, quantised or grown again, and the base's own tensor is copied
into it. `benchmarks/block.py` times it beside the others.

Shapes: T tokens, K selected per token, S = T * K slots, N of them of the new expert, D width, I expert width,
M experts in all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moextend_pl.moe.dispatch import _project, _spans, sum_slots
from moextend_pl.moe.extension.extended_experts import ExtendedExperts


class SingleStack(nn.Module):
    """Stands where `ExtendedExperts` with one new expert stood, and computes the same.

    Args:
        experts: The experts; their weights are copied.
    """

    def __init__(self, experts: ExtendedExperts) -> None:
        super().__init__()
        self.base_experts, self.act = int(experts.base.num_experts), experts.base._apply_gate
        self.stacks = {}
        for name in ("gate_up_proj", "down_proj"):
            new, old = getattr(experts.new, name).detach(), getattr(experts.base, name).detach()
            self.stacks[name] = torch.cat([new, old])
            self.register_parameter(f"new_{name}", nn.Parameter(self.stacks[name][:1]))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes (T, D) from (T, D), (T, K) indices among all experts, the new one last, and (T, K) weights."""
        first_TK = (top_k_index + 1) % (self.base_experts + 1)
        y_TD: Tensor = _OneStack.apply(
            hidden_states, top_k_weights, first_TK, self.new_gate_up_proj, self.new_down_proj, self
        )
        return y_TD

    def _apply(self, fn: Any, recurse: bool = True) -> SingleStack:
        raise NotImplementedError("a view of a stack does not survive being moved; move the experts first")


class _OneStack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, _up: Tensor, _down: Tensor, experts: Any
    ) -> Tensor:
        up, down = experts.stacks["gate_up_proj"], experts.stacks["down_proj"]
        experts_S, perm_S = torch.sort(indices_TK.reshape(-1))
        offsets_M = torch.searchsorted(experts_S, torch.arange(len(up), device=x_TD.device), right=True, out_int32=True)
        slots_TK = torch.empty_like(perm_S).scatter_(0, perm_S, torch.arange(len(perm_S), device=x_TD.device))
        slots_TK, tokens_S = slots_TK.view_as(indices_TK), perm_S // indices_TK.shape[-1]
        out_SD, projected = x_TD.new_empty(len(perm_S), x_TD.shape[-1]), []
        for members, slots in _spans(offsets_M, len(perm_S)):
            offsets = offsets_M[members] - slots.start
            h = _project(x_TD[tokens_S[slots]], up[members], offsets, True)
            out_SD[slots] = _project(experts.act(h), down[members], offsets, True)
            projected.append(h)
        ctx.experts = experts
        ctx.save_for_backward(x_TD, weights_TK, perm_S, slots_TK, offsets_M, *projected)
        return sum_slots(out_SD, slots_TK, weights_TK).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, perm_S, slots_TK, offsets_M, *projected = ctx.saved_tensors
        up, down = ctx.experts.stacks["gate_up_proj"], ctx.experts.stacks["down_proj"]
        tokens_S, weights_S = perm_S // weights_TK.shape[-1], weights_TK.reshape(-1)
        dweights_S, dx_SD = torch.empty_like(weights_S), dy_TD.new_empty(len(perm_S), dy_TD.shape[-1])
        count_N, new_grads = int(offsets_M[0]), [torch.zeros_like(up[:1]), torch.zeros_like(down[:1])]
        for h_saved, (members, slots) in zip(projected, _spans(offsets_M, len(perm_S)), strict=True):
            offsets, scale = offsets_M[members] - slots.start, weights_S[perm_S[slots]].unsqueeze(-1)
            dy = dy_TD[tokens_S[slots]]
            d = _project(dy, down[members], offsets, False)
            with torch.enable_grad():
                h = h_saved.detach().requires_grad_()
                a = ctx.experts.act(h)
            dweights_S[perm_S[slots]] = (a.detach() * d).sum(dim=-1, dtype=weights_S.dtype)
            (dh,) = torch.autograd.grad(a, h, d * scale)
            dx_SD[slots] = _project(dh, up[members], offsets, False)
            if slots.start < count_N:
                new_grads[0][0] = dh[:count_N].T @ x_TD[tokens_S[:count_N]]
                new_grads[1][0] = (dy[:count_N] * scale[:count_N]).to(dy.dtype).T @ a.detach()[:count_N]
        dweights_TK = dweights_S.view_as(weights_TK)
        return sum_slots(dx_SD, slots_TK, None).to(dy_TD.dtype), dweights_TK, None, *new_grads, None
