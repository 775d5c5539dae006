"""Experts with new members, wrapped around the frozen ones of the base, as often as a model is extended.

Shapes: T tokens, D width, N new experts, M experts in all, K selected per token, U slots that chose a new expert.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moextend_pl.moe.dispatch import by_kernels, kernel_experts
from moextend_pl.moe.extension.reach import Reach
from moextend_pl.moe.nf4 import packed_rows
from moextend_pl.moe.parallel.cut import copied_rows
from moextend_pl.moe.touch import touch


def expert_rows(experts: nn.Module, rows: Sequence[int]) -> dict[str, Tensor]:
    """Returns copies of the weights of some experts.

    Args:
        experts: Experts module of the base, or an extended one.
        rows: Experts to copy, new ones of an extended module included.

    Returns:
        Tensors with one entry for each expert named, by the parameter's name.
    """
    if isinstance(experts, ExtendedExperts):
        sides = [
            (experts.base, row) if row < experts.base_experts else (experts.new, row - experts.base_experts)
            for row in rows
        ]
        copies = [expert_rows(module, [row]) for module, row in sides]
        return {name: torch.cat([one[name] for one in copies]) for name in copies[0]}
    plain = {name: copied_rows(value, rows) for name, value in experts.named_parameters(recurse=False)}
    return {**plain, **packed_rows(experts, rows)}


def sprout(experts: nn.Module, sources: Sequence[int]) -> Any:
    """Makes a module of new experts, each a copy of one of the old, that computes as the old one does.

    The copy is of the base's own class, so that transposed, biased or clamped experts and every
    registered experts implementation work as they do in the base.

    Args:
        experts: Experts module of the base, or an extended one.
        sources: Expert to copy for each new one.

    Returns:
        A module of N experts with parameters of its own.
    """
    root: Any = experts.root if isinstance(experts, ExtendedExperts) else experts
    new: Any = copy.copy(root)
    for name, hooks in vars(root).items():
        if "_hooks" in name:  # a hook that the old experts get later is none of the new ones'
            setattr(new, name, copy.copy(hooks))
    new._parameters = {name: nn.Parameter(rows) for name, rows in expert_rows(experts, sources).items()}
    new._buffers = dict(root._buffers)
    new._modules = {name: copy.deepcopy(child) for name, child in root.named_children() if name not in new._parameters}
    new.num_experts = len(sources)
    new._is_expert_parallel = False
    return new


class ExtendedExperts(nn.Module):
    """Old experts and new ones, called as one.

    Each side skips the tokens of the other: transformers' experts ignore an index equal to their
    number, which is how it runs experts in parallel.

    Args:
        base: Frozen experts module of the base, or another `ExtendedExperts`.
        sources: Expert that each new one is copied from.
        reach: Mask of the tokens that may reach new experts.
    """

    base: Any

    def __init__(self, base: nn.Module, sources: Sequence[int], reach: Reach) -> None:
        super().__init__()
        self.reach = reach
        self.base = base
        self.new = sprout(base, sources)
        self.base._is_expert_parallel = True
        self.base_experts = int(self.base.num_experts)
        self.num_experts = self.base_experts + len(sources)

    @property
    def root(self) -> nn.Module:
        """The experts of the base, under all extensions."""
        root: nn.Module = self.base.root if isinstance(self.base, ExtendedExperts) else self.base
        return root

    def new_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters that are not the base's, by the part of the training plan they belong to."""
        return {"new_experts": list(self.new.parameters())}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes the weighted sum of the selected experts.

        Args:
            hidden_states: (T, D).
            top_k_index: (T, K) indices among all M experts; M itself is skipped.
            top_k_weights: (T, K) routing weights.

        Returns:
            (T, D).
        """
        if not self.reach.nowhere and by_kernels(self.root, hidden_states.device):
            return kernel_experts(self.root, self._new_stacks(), hidden_states, top_k_index, top_k_weights)
        is_new_TK = top_k_index >= self.base_experts
        y_TD = self._call(self.base, hidden_states, top_k_index, top_k_weights, is_new_TK)
        if self.reach.nowhere:
            return self._touched(y_TD)
        if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
            self.new._is_expert_parallel = True
            return y_TD + self._new_by_token(hidden_states, top_k_index, top_k_weights)
        self.new._is_expert_parallel = False
        tokens_U, slots_U = (is_new_TK & (top_k_index < self.num_experts)).nonzero(as_tuple=True)
        if not len(tokens_U):
            return self._touched(y_TD)
        # One slot a row: nothing of this call is another module's, so that nothing has to be skipped.
        indices_U1 = top_k_index[tokens_U, slots_U, None] - self.base_experts
        new_UD = self.new(hidden_states[tokens_U], indices_U1, top_k_weights[tokens_U, slots_U, None])
        return y_TD.index_add(0, tokens_U, new_UD)

    def _new_stacks(self) -> tuple[Tensor, Tensor]:
        """Returns both projections of the new experts of all extensions."""
        own = (self.new.gate_up_proj, self.new.down_proj)
        if not isinstance(self.base, ExtendedExperts):
            return own
        first, second = (torch.cat(pair) for pair in zip(self.base._new_stacks(), own, strict=True))
        return first, second

    def _touched(self, y_TD: Tensor) -> Tensor:
        zero = touch(self.new.parameters())
        return y_TD if zero is None else y_TD + zero.to(y_TD.dtype)

    def _new_by_token(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Computes the new experts in shapes that no value decides: a GPU is not waited for, a compiler sees one graph.

        A token selects a new expert once at most, so that it has as many slots here as there are new experts.
        """
        is_own_TK = (indices_TK >= self.base_experts) & (indices_TK < self.num_experts)
        slots = min(indices_TK.shape[1], self.num_experts - self.base_experts)
        own_TN = is_own_TK.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :slots]
        new_TN = indices_TK.gather(1, own_TN) - self.base_experts
        others_TN = ~is_own_TK.gather(1, own_TN)
        return self._call(self.new, x_TD, new_TN, weights_TK.gather(1, own_TN), others_TN)

    def _call(self, experts: Any, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, skip_TK: Tensor) -> Tensor:
        # Not every family's own loop knows the index that is to be skipped; a weight of zero skips as well.
        eager = getattr(getattr(experts, "config", None), "_experts_implementation", None) == "eager"
        nobody = 0 if eager else experts.num_experts
        return experts(x_TD, indices_TK.masked_fill(skip_TK, nobody), weights_TK.masked_fill(skip_TK, 0.0))
