"""Router and experts with new members, wrapped around the frozen ones of the base.

Shapes: B batch, S sequence, T tokens, D width, E experts of the base, N new experts, M = E + N,
K selected per token, U tokens that chose a new expert.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moextend_pl.moe.calibration import Calibration
from moextend_pl.moe.routing import family_table, route_among_all, route_within_families


class Reach:
    """Which tokens of the current forward pass may reach new experts.

    One object is shared by all extended layers of a model. The mask is kept by sequence and not by
    token, so that it holds for a prompt, for each cached decoding step after it, and for the beams of
    one prompt, which stand side by side.
    """

    def __init__(self) -> None:
        self._mask_B: Tensor | None = None

    def set(self, mask_B: Tensor | None) -> None:
        """Declares the next forward passes.

        Args:
            mask_B: True for each sequence whose tokens may reach new experts; None means no sequence.
        """
        self._mask_B = mask_B if mask_B is not None and bool(mask_B.any()) else None

    @property
    def nowhere(self) -> bool:
        """Whether no token may reach a new expert."""
        return self._mask_B is None

    def tokens(self, num_tokens: int) -> Tensor:
        """Returns the mask by token.

        Args:
            num_tokens: T, a multiple of the number of sequences.

        Returns:
            (T,) booleans.
        """
        assert self._mask_B is not None
        each, rest = divmod(num_tokens, len(self._mask_B))
        assert rest == 0, f"{num_tokens} tokens do not divide into the {len(self._mask_B)} sequences of the mask"
        return self._mask_B.repeat_interleave(each)


def touch(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Returns a zero that depends on every learning parameter, so that each always has a gradient.

    Without it a rank whose tokens reach no new expert has no gradient to reduce and its peers wait.

    Args:
        parameters: Parameters of which the learning ones are touched.

    Returns:
        A scalar 0, or None if nothing learns here and now.
    """
    learning = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    return torch.stack([p.flatten()[0].float() for p in learning]).sum() * 0.0 if learning else None


class ExtendedRouter(nn.Module):
    """The base's router with rows for new experts.

    Tokens that may not reach new experts get the base router's own result, bit for bit.

    Args:
        base: Frozen router that returns `(logits (T, E), weights (T, K), indices (T, K))`.
        sources: Base expert whose row each new expert starts from; its length is N.
        reach: Shared mask of the tokens that may reach new experts.
        init: `copy` or `preserving`, see `contracts.ExtensionPlan`.
        calibration: Correction of the probabilities, or None.
    """

    base: Any
    families_ER: Tensor  # noqa: N815 - a tensor's name carries its shape

    def __init__(
        self, base: nn.Module, sources: Sequence[int], reach: Reach, *, init: str, calibration: Calibration | None
    ) -> None:
        super().__init__()
        self.base = base
        self.reach = reach
        self.init = init
        self.calibration = calibration
        self.base_experts = len(self.base.weight)
        self.num_experts = self.base_experts + len(sources)
        self.weight = nn.Parameter(self.base.weight.detach()[list(sources)].clone())
        self.register_buffer("families_ER", family_table(self.base_experts, sources), persistent=False)

    def new_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters that are not the base's, by the part of the training plan they belong to."""
        calibration = [] if self.calibration is None else list(self.calibration.parameters())
        return {"new_routers": [self.weight], "calibration": calibration}

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Routes tokens.

        Args:
            hidden_states: (T, D), or any shape with D last.

        Returns:
            Logits before softmax and calibration, (T, M), or (T, E) if no token may reach new experts;
            routing weights (T, K); expert indices (T, K), where E and above are new experts.
        """
        logits_TE, weights_TK, indices_TK = self.base(hidden_states)
        if self.reach.nowhere:
            zero = touch(self.parameters())
            return logits_TE, weights_TK if zero is None else weights_TK + zero, indices_TK
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        # One product for old and new rows: a fresh copy then ties with its source exactly, whatever the number of
        # tokens, and not by how two products of different shapes happen to round.
        rows_MD = torch.cat([self.base.weight, self.weight.to(self.base.weight.dtype)])
        logits_TM = F.linear(x_TD, rows_MD.to(x_TD.dtype)).to(logits_TE.dtype)
        new_weights_TK, new_indices_TK = self._route(logits_TM, weights_TK.shape[-1])
        open_T1 = self.reach.tokens(len(x_TD)).unsqueeze(-1)
        weights_TK = torch.where(open_T1, new_weights_TK.to(weights_TK.dtype), weights_TK)
        return logits_TM, weights_TK, torch.where(open_T1, new_indices_TK, indices_TK)

    def _route(self, logits_TM: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        calibrate = nn.Identity() if self.calibration is None else self.calibration
        if self.init == "preserving":
            return route_within_families(logits_TM, top_k, calibrate, self.families_ER)
        return route_among_all(logits_TM, top_k, calibrate)


def sprout(experts: nn.Module, sources: Sequence[int]) -> Any:
    """Makes a module of new experts, each a copy of one of the old, that computes as the old one does.

    The copy is of the base's own class, so that transposed, biased or clamped experts and every
    registered experts implementation work as they do in the base.

    Args:
        experts: Experts module of the base.
        sources: Expert to copy for each new one.

    Returns:
        A module of N experts with parameters of its own.
    """
    new: Any = copy.copy(experts)
    new._parameters = {
        name: nn.Parameter(value.detach()[list(sources)].clone())
        for name, value in experts.named_parameters(recurse=False)
    }
    new._buffers = dict(experts._buffers)
    new._modules = {name: copy.deepcopy(child) for name, child in experts.named_children()}
    new.num_experts = len(sources)
    new._is_expert_parallel = True
    return new


class ExtendedExperts(nn.Module):
    """The base's experts and the new ones, called as one.

    Each side skips the tokens of the other: transformers' experts ignore an index equal to their
    number, which is how it runs experts in parallel.

    Args:
        base: Frozen experts module of the base.
        sources: Base expert that each new expert is copied from.
        reach: Shared mask of the tokens that may reach new experts.
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

    def new_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters that are not the base's, by the part of the training plan they belong to."""
        return {"new_experts": list(self.new.parameters())}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes the weighted sum of the selected experts.

        Args:
            hidden_states: (T, D).
            top_k_index: (T, K) indices among all M experts.
            top_k_weights: (T, K) routing weights.

        Returns:
            (T, D).
        """
        zero = touch(self.new.parameters())
        if self.reach.nowhere:
            y_TD = self.base(hidden_states, top_k_index, top_k_weights)
            return y_TD if zero is None else y_TD + zero.to(y_TD.dtype)
        is_new_TK = top_k_index >= self.base_experts
        y_TD = self.base(
            hidden_states,
            top_k_index.masked_fill(is_new_TK, self.base_experts),
            top_k_weights.masked_fill(is_new_TK, 0.0),
        )
        users_U = is_new_TK.any(dim=-1).nonzero().squeeze(-1)
        if len(users_U):
            y_TD = y_TD.index_add(0, users_U, self._new_output(hidden_states, top_k_index, top_k_weights, users_U))
        return y_TD if zero is None else y_TD + zero.to(y_TD.dtype)

    def _new_output(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, users_U: Tensor) -> Tensor:
        indices_UK = indices_TK[users_U] - self.base_experts
        is_old_UK = indices_UK < 0
        return self.new(
            x_TD[users_U],
            indices_UK.masked_fill(is_old_UK, self.new.num_experts),
            weights_TK[users_U].masked_fill(is_old_UK, 0.0),
        )
