"""A router with rows for new experts, wrapped around the frozen one of the base.

A wrapper may itself be wrapped: a model extended for one task is extended for the next by wrapping again,
and each extension has its own mask of the tokens that may reach it.

Shapes: T tokens, D width, E experts of what is wrapped, N new experts, M = E + N, K selected per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moextend_pl.moe.dispatch import kernel_routing, routed_by_kernels
from moextend_pl.moe.extension.calibration import Calibration
from moextend_pl.moe.extension.reach import Reach
from moextend_pl.moe.families import ARGUMENT, RouterFacts, tensor_named
from moextend_pl.moe.routing import Selection, family_table, family_winners, join_gates, seat_winners, select, weigh
from moextend_pl.moe.touch import touch

STEP_ROWS = 8
"""Rows by which the product with a router's rows grows; in 32 bits a CPU may round what is left over otherwise."""


class ExtendedRouter(nn.Module):
    """A router with rows for new experts.

    Tokens that may not reach new experts get the wrapped router's own result, bit for bit.

    Args:
        base: Frozen router that returns `(logits (T, E), weights (T, K), indices (T, K))`, or another
            `ExtendedRouter`.
        facts: How the family's router scores.
        sources: Expert whose row each new expert starts from; its length is N.
        reach: Mask of the tokens that may reach new experts.
        init: `copy` or `preserving`, see `contracts.ExtensionPlan`.
        calibration: Correction of the scores, or None.
        experts: Experts module of the base; where kernels compute it, one selects too.
    """

    base: Any
    families_ER: Tensor
    sources_N: Tensor

    def __init__(
        self,
        base: nn.Module,
        facts: RouterFacts,
        sources: Sequence[int],
        reach: Reach,
        *,
        init: str,
        calibration: Calibration | None,
        experts: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._experts = (experts,)  # none of this module's children
        self.base, self.facts, self.reach, self.init, self.calibration = base, facts, reach, init, calibration
        rows = list(sources)
        self.base_experts = len(self._base_rows(facts.weight))
        self.num_experts = self.base_experts + len(rows)
        self.weight = nn.Parameter(self._base_rows(facts.weight).detach()[rows].clone())
        self.bias = None
        if facts.logit_bias:
            self.bias = nn.Parameter(self._base_rows(facts.logit_bias).detach()[rows].clone())
        place = self.weight.device
        self.register_buffer("families_ER", family_table(self.base_experts, rows).to(place), persistent=False)
        self.register_buffer("sources_N", torch.tensor(rows, dtype=torch.long, device=place), persistent=False)

    @property
    def root(self) -> nn.Module:
        """The router of the base, under all extensions."""
        root: nn.Module = self.base.root if isinstance(self.base, ExtendedRouter) else self.base
        return root

    def new_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters that are not the base's, by the part of the training plan they belong to."""
        calibration = [] if self.calibration is None else list(self.calibration.parameters())
        rows = [self.weight] if self.bias is None else [self.weight, self.bias]
        return {"new_routers": rows, "calibration": calibration}

    def train(self, mode: bool = True) -> ExtendedRouter:
        """Changes the mode of what is new; a frozen router neither jitters nor samples."""
        super().train(mode)
        self.base.eval()
        return self

    def _base_rows(self, name: str) -> Tensor:
        if isinstance(self.base, ExtendedRouter):
            return self.base.rows(name)
        rows = tensor_named(self.base, name)
        return rows if name == self.facts.weight else rows.reshape(-1)

    def rows(self, name: str) -> Tensor:
        """Returns the rows of all M experts.

        Args:
            name: The facts' `weight` or `logit_bias`.
        """
        own = self.weight if name == self.facts.weight else self.bias
        base = self._base_rows(name)
        assert own is not None
        return torch.cat([base, own.to(base.dtype)])

    def _selection_bias(self, extra: tuple[Any, ...]) -> Tensor | None:
        """Returns the selection bias of all M experts; a new expert has that of its source."""
        if isinstance(self.base, ExtendedRouter):
            old = self.base._selection_bias(extra)
        elif self.facts.selection_bias == ARGUMENT:
            old = extra[0].reshape(-1)
        else:
            name = self.facts.selection_bias
            old = tensor_named(self.base, name).reshape(-1) if name else None
        return None if old is None else torch.cat([old, old[self.sources_N]])

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Returns the (T, M) logits of all experts, before any score.

        Args:
            hidden_states: (T, D), or any shape with D last.
        """
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        # One product for old and new rows, in whole steps: a fresh copy then ties with its source exactly, whatever the
        # number of tokens, and not by how two products, or the last columns of one, happen to round.
        rows_MD = self.rows(self.facts.weight)
        dtype = torch.float32 if self.facts.in_fp32 or rows_MD.dtype == torch.float32 else x_TD.dtype
        missing = -len(rows_MD) % STEP_ROWS
        bias_M = F.pad(self.rows(self.facts.logit_bias).to(dtype), (0, missing)) if self.facts.logit_bias else None
        logits_TM = F.linear(x_TD.to(dtype), F.pad(rows_MD.to(dtype), (0, 0, 0, missing)), bias_M)
        logits_TM = logits_TM[:, : len(rows_MD)].contiguous()
        cap = self.facts.softcap
        return cap * (logits_TM.float() / cap).tanh() if cap else logits_TM

    def forward(self, hidden_states: Tensor, *extra: Any) -> tuple[Tensor, ...]:
        """Routes tokens.

        Args:
            hidden_states: (T, D), or any shape with D last.
            extra: What else the block hands to its router.

        Returns:
            In the family's order: logits before score and calibration, (T, M), or those of the wrapped router if
            no token may reach new experts, minus infinity where one of several extensions is closed to a token;
            routing weights (T, K); expert indices (T, K), where E and above are
            new experts.
        """
        output = self.base(hidden_states, *extra)
        logits_TE, weights_TK, indices_TK = (output[n] for n in self.facts.order)
        if self.reach.nowhere:
            zero = touch(self.new_parts())
            return self._ordered(logits_TE, weights_TK if zero is None else weights_TK + zero, indices_TK)
        logits_TM = self.logits(hidden_states)
        if self._by_kernels(logits_TM.device):
            return self._ordered(logits_TM, *self._select_by_kernels(logits_TM, weights_TK, indices_TK))
        chosen = self.select(logits_TM, weights_TK.shape[-1], extra)
        new_weights_TK = weigh(chosen.gates_TM.gather(1, chosen.indices_TK), self.facts.scoring)
        if isinstance(self.base, ExtendedRouter):
            # An expert that a token cannot choose has no share of its probabilities, which the balance loss is about.
            logits_TM = logits_TM.masked_fill(self.closed(logits_TM), float("-inf"))
        open_T1 = self.reach.tokens(len(logits_TM)).unsqueeze(-1)
        weights_TK = torch.where(open_T1, new_weights_TK.to(weights_TK.dtype), weights_TK)
        return self._ordered(logits_TM, weights_TK, torch.where(open_T1, chosen.indices_TK, indices_TK))

    def _by_kernels(self, device: torch.device) -> bool:
        (experts,), facts = self._experts, self.facts
        if experts is None or isinstance(self.base, ExtendedRouter) or facts.selection_bias:
            return False
        return routed_by_kernels(experts, facts.scoring, self.num_experts, device)

    def _select_by_kernels(self, logits_TM: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> tuple[Tensor, Tensor]:
        calibration, scoring = self.calibration, self.facts.scoring
        matrices = None if calibration is None else (calibration.in_proj, calibration.out_proj)
        form = "none" if calibration is None else calibration.form
        return kernel_routing(
            logits_TM, self.reach.tokens(len(logits_TM)), (weights_TK, indices_TK), self.sources_N, matrices,
            form=form, families=self.init == "preserving", normalised=scoring.normalised, scale=scoring.scale,
        )  # fmt: skip

    def _ordered(self, *output: Tensor) -> tuple[Tensor, ...]:
        """Returns logits, weights and indices in the order of the family."""
        return tuple(output[self.facts.order.index(n)] for n in range(len(output)))

    def new_parts(self) -> list[nn.Parameter]:
        """Returns every parameter of `new_parameters` in one list."""
        return [parameter for parameters in self.new_parameters().values() for parameter in parameters]

    def select(self, logits_TM: Tensor, top_k: int, extra: tuple[Any, ...] = ()) -> Selection:
        """Selects experts for tokens that may reach new ones.

        Args:
            logits_TM: As returned by `logits`.
            top_k: K.
            extra: As in `forward`.

        Returns:
            The selection, calibrated.
        """
        if self.init == "preserving":
            winning_TE, winners_TE = family_winners(logits_TM, self.families_ER)
            chosen = seat_winners(self._select_old(winning_TE, top_k, extra), winners_TE, self.num_experts)
        else:
            chosen = self._select_among_all(logits_TM, top_k, extra)
        if self.calibration is None:
            return chosen
        return chosen._replace(gates_TM=self.calibration(chosen.scores_TM, chosen.gates_TM))

    def _select_among_all(self, logits_TM: Tensor, top_k: int, extra: tuple[Any, ...]) -> Selection:
        bias_M = self._selection_bias(extra)
        if not isinstance(self.base, ExtendedRouter):
            scores_TM, indices_TK = select(logits_TM, top_k, self.facts.scoring, bias_M)
            return Selection(scores_TM, scores_TM, indices_TK)
        closed_TM = F.pad(self.base.closed(logits_TM), (0, self.num_experts - self.base_experts))
        logits_TM = logits_TM.masked_fill(closed_TM, float("-inf"))
        scores_TM, indices_TK = select(logits_TM, top_k, self.facts.scoring, bias_M, closed_TM)
        old = self._select_old(logits_TM[:, : self.base_experts], top_k, extra)
        return Selection(scores_TM, join_gates(scores_TM, old), indices_TK)

    def closed(self, like_T: Tensor) -> Tensor:
        """Returns which experts a token may not reach.

        Args:
            like_T: Any tensor of T rows, on the right device.

        Returns:
            (T, M) booleans.
        """
        new, old = self.num_experts - self.base_experts, self.base_experts
        closed_TE = self.base.closed(like_T) if isinstance(self.base, ExtendedRouter) else self._nothing(like_T, old)
        if self.reach.nowhere:
            return torch.cat([closed_TE, ~self._nothing(like_T, new)], dim=1)
        return torch.cat([closed_TE, ~self.reach.tokens(len(like_T)).unsqueeze(1).expand(-1, new)], dim=1)

    @staticmethod
    def _nothing(like_T: Tensor, columns: int) -> Tensor:
        return torch.zeros(len(like_T), columns, dtype=torch.bool, device=like_T.device)

    def _select_old(self, logits_TE: Tensor, top_k: int, extra: tuple[Any, ...]) -> Selection:
        """Routes among what is wrapped, from logits, each token among what it may reach."""
        if isinstance(self.base, ExtendedRouter):
            inner, fewer = self.base, self.base.base_experts
            rest = inner._select_old(logits_TE[:, :fewer], top_k, extra)
            padding = (0, inner.num_experts - fewer)
            rest = Selection(F.pad(rest.scores_TM, padding), F.pad(rest.gates_TM, padding), rest.indices_TK)
            if inner.reach.nowhere:
                return rest
            full, open_T1 = inner.select(logits_TE, top_k, extra), inner.reach.tokens(len(logits_TE)).unsqueeze(1)
            return Selection(*(torch.where(open_T1, one, other) for one, other in zip(full, rest, strict=True)))
        bias: Tensor | None = None
        if self.facts.selection_bias == ARGUMENT:
            bias = extra[0].reshape(-1)
        elif self.facts.selection_bias:
            bias = tensor_named(self.base, self.facts.selection_bias).reshape(-1)
        scores_TE, indices_TK = select(logits_TE, top_k, self.facts.scoring, bias)
        return Selection(scores_TE, scores_TE, indices_TK)


def extended_by(router: nn.Module) -> tuple[int, ...]:
    """Returns names of the extensions that have grown a router, the first one first; equal for routers grown alike."""
    return (*extended_by(router.base), id(router.reach)) if isinstance(router, ExtendedRouter) else ()


def open_tokens(router: nn.Module, like_T: Tensor) -> Tensor:
    """Returns which tokens of the current pass choose freely: all of them in a router that is not extended.

    Args:
        router: A router, extended or not.
        like_T: Any tensor of T elements, on the right device.

    Returns:
        (T,) booleans; True where the token may reach the new experts of at least one extension.
    """
    if not isinstance(router, ExtendedRouter):
        return torch.ones_like(like_T, dtype=torch.bool)
    inner = router.base
    open_T = (
        open_tokens(inner, like_T) if isinstance(inner, ExtendedRouter) else torch.zeros_like(like_T, dtype=torch.bool)
    )
    return open_T if router.reach.nowhere else open_T | router.reach.tokens(len(like_T))
