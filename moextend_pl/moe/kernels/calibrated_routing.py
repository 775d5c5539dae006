"""Routing with new experts as one operation: softmax, families, calibration, selection, weights, and their gradients.

For routers that score by a softmax, have no bias of selection and no groups, and are extended once; the numbers are
those of `moe/routing.py`. Of experts with equal scores the first is selected.

Shapes: T tokens, E old experts, M experts in all, N = M - E, K selected per token, C hidden units of the calibration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moextend_pl.moe.routing import Scoring

MOST_EXPERTS = 256
"""Of which one program holds the scores of some tokens."""
FORMS = {"none": 0, "additive": 1, "multiplicative": 2}


def suits(scoring: Scoring, experts: int) -> bool:
    """Returns whether the operation knows a family's scoring, for so many experts."""
    return scoring.score == "softmax" and scoring.groups == 1 and experts <= MOST_EXPERTS


def calibrated_routing(
    logits_TM: Tensor,
    open_T: Tensor,
    base: tuple[Tensor, Tensor],
    sources_N: Tensor,
    calibration: tuple[Tensor, Tensor] | None,
    *,
    form: str,
    families: bool,
    normalised: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Selects and weighs experts.

    Args:
        logits_TM: Router logits, old experts first.
        open_T: Tokens that may reach new experts; the others get what `base` says, bit for bit.
        base: Weights (T, K) and indices (T, K) of the wrapped router.
        sources_N: Expert that each new one was copied from.
        calibration: `in_proj` (C, M) and `out_proj` (M, C), or None.
        form: How the calibration corrects scores: `none`, `additive` or `multiplicative`.
        families: Whether a new expert competes with its source only.
        normalised: Whether weights are divided by their sum.
        scale: Factor on the weights.

    Returns:
        Weights and indices, in the types of `base`.
    """
    parts = [logits_TM.new_empty(0), logits_TM.new_empty(0)] if calibration is None else list(calibration)
    logits_TM, weights_TK, indices_TK = (one.contiguous() for one in (logits_TM, *base))
    how = [FORMS[form], families, normalised]
    weights_TK, indices_TK = _choose(logits_TM, open_T, weights_TK, indices_TK, sources_N, parts, how, scale)
    return weights_TK, indices_TK


@torch.library.custom_op("moextend::calibrated_routing", mutates_args=())
def _choose(
    logits_TM: Tensor, open_T: Tensor, base_weights_TK: Tensor, base_indices_TK: Tensor, sources_N: Tensor,
    calibration: list[Tensor], how: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from moextend_pl.moe.kernels import launch

    out = torch.empty_like(base_weights_TK), torch.empty_like(base_indices_TK)
    base = (base_weights_TK, base_indices_TK)
    launch.choose(logits_TM, open_T, base, sources_N, calibration, out, (*how, scale))
    return out


@_choose.register_fake
def _(
    logits_TM: Tensor, open_T: Tensor, base_weights_TK: Tensor, base_indices_TK: Tensor, *_: Any  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(base_weights_TK), torch.empty_like(base_indices_TK)


@torch.library.custom_op("moextend::calibrated_routing_backward", mutates_args=())
def _choose_backward(
    dweights_TK: Tensor, logits_TM: Tensor, open_T: Tensor, indices_TK: Tensor, sources_N: Tensor,
    calibration: list[Tensor], how: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of logits and of both matrices of the calibration."""
    from moextend_pl.moe.kernels import launch

    return launch.choose_gradient(dweights_TK, logits_TM, open_T, indices_TK, sources_N, calibration, (*how, scale))


@_choose_backward.register_fake
def _(
    dweights_TK: Tensor, logits_TM: Tensor, open_T: Tensor, indices_TK: Tensor, sources_N: Tensor,  # noqa: ARG001
    calibration: list[Tensor], *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(logits_TM), torch.empty_like(calibration[0]), torch.empty_like(calibration[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_TM, open_T, _, _, sources_N, calibration, *ctx.how = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_TM, open_T, output[1], sources_N, *calibration)


def _differentiate(ctx: Any, dweights_TK: Tensor | None, _: Any) -> tuple[Any, ...]:
    logits_TM, open_T, indices_TK, sources_N, *calibration = ctx.saved_tensors
    if dweights_TK is None:  # what comes after has no gradient
        dweights_TK = logits_TM.new_zeros(indices_TK.shape)
    dlogits_TM, *rest = _choose_backward(
        dweights_TK.contiguous(), logits_TM, open_T, indices_TK, sources_N, calibration, *ctx.how
    )
    dbase_TK = dweights_TK.masked_fill(open_T.unsqueeze(1), 0.0) if ctx.needs_input_grad[2] else None
    return dlogits_TM, None, dbase_TK, None, None, rest, None, None


_choose.register_autograd(_differentiate, setup_context=_keep)
