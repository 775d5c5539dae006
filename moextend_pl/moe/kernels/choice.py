"""From router logits to experts and weights in one pass, and back, as Triton kernels: the numbers of `moe/routing.py`.

Softmax, families, calibration and selection of some tokens stay in a processor; tokens that may not reach new experts
get the wrapped router's own result. What backward needs is computed again from the logits.

Shapes: T tokens, E old experts, M experts in all, N = M - E, K selected per token, C hidden units of the calibration.
"""

# mypy: ignore-errors
# The decorator hides types, and pointers have none.

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST_SUM = tl.constexpr(1e-6)
"""As in `moe/routing.py`."""
ADDITIVE, MULTIPLICATIVE = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _picked(values, m, column):
    """Returns one column of a tile."""
    return tl.sum(tl.where(m[None, :] == column, values, 0), axis=1)


@triton.jit
def _families(x, m, sources_N, E, NEW: tl.constexpr):
    """Leaves each family its strongest member: a new expert before its source, the first of several."""
    strongest = x
    winner = tl.zeros_like(x).to(tl.int32) + m[None, :]
    for back in tl.static_range(NEW):
        n = NEW - 1 - back
        own = _picked(x, m, E + n)[:, None]
        wins = (m == tl.load(sources_N + n))[None, :] & (own >= strongest)
        strongest = tl.where(wins, own, strongest)
        winner = tl.where(wins, E + n, winner)
    alive = (winner == m[None, :]) & (m < E)[None, :]
    for n in tl.static_range(NEW):
        of_source = (m == tl.load(sources_N + n))[None, :] & (winner == E + n)
        won = tl.sum(of_source.to(tl.int32), axis=1) > 0
        alive = alive | ((m == E + n)[None, :] & won[:, None])
    return tl.where(alive, x, float("-inf"))


@triton.jit
def _scores(logits_TM, sources_N, t, m, T, M, E, NEW: tl.constexpr, FAMILIES: tl.constexpr):
    """Returns the scores of some tokens, and below zero what cannot be selected."""
    inside = (t < T)[:, None] & (m < M)[None, :]
    x = tl.load(logits_TM + t[:, None] * M + m[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.where((m < M)[None, :], x, float("-inf"))
    if FAMILIES:
        x = _families(x, m, sources_N, E, NEW)
    powers = tl.exp(x - tl.max(x, axis=1)[:, None])
    scores = powers / tl.sum(powers, axis=1)[:, None]
    return scores, tl.where(x == float("-inf"), -1.0, scores)


@triton.jit
def _weights(in_proj_CM, out_proj_MC, c, m, M, C):
    """Returns hidden units of the calibration, (C, M) both."""
    inside = (c < C)[:, None] & (m < M)[None, :]
    first = tl.load(in_proj_CM + c[:, None] * M + m[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(out_proj_MC + m[None, :] * C + c[:, None], mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _calibrated(scores, in_proj_CM, out_proj_MC, m, M, C, FORM: tl.constexpr, UNITS: tl.constexpr):
    """Returns `W2 gelu(W1 scores)`, and the scores with it."""
    correction = tl.zeros_like(scores)
    for start in range(0, C, UNITS):
        first, second = _weights(in_proj_CM, out_proj_MC, start + tl.arange(0, UNITS), m, M, C)
        h = tl.dot(scores, tl.trans(first), input_precision="ieee")
        gelu = 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
        correction = tl.dot(gelu, second, correction, input_precision="ieee")
    return correction, (scores + correction if FORM == ADDITIVE else scores * (1 + correction))


@triton.jit
def _divisor(total):
    """Returns a sum of gates, kept away from zero with its own sign, and whether it had to be."""
    near = tl.abs(total) < SMALLEST_SUM
    # 1 / total tells zeros of either sign apart.
    negative = (total < 0) | ((total == 0) & (1.0 / total < 0))
    return tl.where(near, tl.where(negative, -SMALLEST_SUM, SMALLEST_SUM), total), near


@triton.jit
def choose(
    logits_TM, open_T, base_weights_TK, base_indices_TK, sources_N, in_proj_CM, out_proj_MC,
    weights_TK, indices_TK, T, M, E, C, scale,
    K: tl.constexpr, SELECTED: tl.constexpr, NEW: tl.constexpr, FAMILIES: tl.constexpr, FORM: tl.constexpr,
    NORMALISED: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Selects experts by their scores, the first of equal ones, and weighs them by their calibrated scores."""
    t, m, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, EXPERTS), tl.arange(0, SELECTED)
    scores, left = _scores(logits_TM, sources_N, t, m, T, M, E, NEW, FAMILIES)
    gates = scores
    if FORM != 0:
        gates = _calibrated(scores, in_proj_CM, out_proj_MC, m, M, C, FORM, UNITS)[1]
    whole = tl.sum(scores, axis=1) * 0  # a token that is not finite stays so
    left = tl.where(left == left, left, 0.0)  # and selects different experts too, for which alone there is room
    chosen = tl.zeros((ROWS, SELECTED), tl.int32)
    weights = tl.zeros((ROWS, SELECTED), tl.float32)
    for one in tl.static_range(K):
        best = tl.max(left, axis=1)
        index = tl.min(tl.where(left == best[:, None], m[None, :], M), axis=1)
        left = tl.where(m[None, :] == index[:, None], -2.0, left)
        chosen = tl.where((k == one)[None, :], index[:, None], chosen)
        gate = tl.sum(tl.where(m[None, :] == index[:, None], gates, 0.0), axis=1) + whole
        weights = tl.where((k == one)[None, :], gate[:, None], weights)
    if NORMALISED:
        weights = weights / _divisor(tl.sum(weights, axis=1))[0][:, None]
    weights *= scale
    inside = (t < T)[:, None] & (k < K)[None, :]
    at = t[:, None] * K + k[None, :]
    is_open = (tl.load(open_T + t, mask=t < T, other=0) != 0)[:, None]
    base = tl.load(base_weights_TK + at, mask=inside, other=0.0)
    others = tl.load(base_indices_TK + at, mask=inside, other=0)
    tl.store(weights_TK + at, tl.where(is_open, weights.to(weights_TK.dtype.element_ty), base), mask=inside)
    tl.store(indices_TK + at, tl.where(is_open, chosen.to(indices_TK.dtype.element_ty), others), mask=inside)


@triton.jit
def _gate_gradients(gates, dweights_TK, indices_TK, t, m, live, scale, K: tl.constexpr, NORMALISED: tl.constexpr):
    """Takes the gradients of weights back to those of gates, (T, M)."""
    total, along = tl.sum(tl.zeros_like(gates), axis=1), tl.sum(tl.zeros_like(gates), axis=1)
    for one in tl.static_range(K):
        at = m[None, :] == tl.load(indices_TK + t * K + one, mask=live, other=-1)[:, None]
        gate = tl.sum(tl.where(at, gates, 0.0), axis=1)
        total += gate
        along += gate * tl.load(dweights_TK + t * K + one, mask=live, other=0.0).to(tl.float32)
    divisor, near = _divisor(total)
    shift = tl.where(near, 0.0, along / (divisor * divisor))
    dgates = tl.zeros_like(gates)
    for one in tl.static_range(K):
        at = m[None, :] == tl.load(indices_TK + t * K + one, mask=live, other=-1)[:, None]
        dweight = tl.load(dweights_TK + t * K + one, mask=live, other=0.0).to(tl.float32)
        dgate = dweight / divisor - shift if NORMALISED else dweight
        dgates = tl.where(at, (scale * dgate)[:, None], dgates)
    return dgates


@triton.jit
def choose_gradient(
    dweights_TK, logits_TM, open_T, indices_TK, sources_N, in_proj_CM, out_proj_MC,
    dlogits_TM, din_PCM, dout_PMC, T, M, E, C, scale,
    K: tl.constexpr, NEW: tl.constexpr, FAMILIES: tl.constexpr, FORM: tl.constexpr, NORMALISED: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of logits, and each program's share of those of the calibration."""
    program = tl.program_id(0)
    t, m = program * ROWS + tl.arange(0, ROWS), tl.arange(0, EXPERTS)
    live = (t < T) & (tl.load(open_T + t, mask=t < T, other=0) != 0)
    scores, _ = _scores(logits_TM, sources_N, t, m, T, M, E, NEW, FAMILIES)
    correction, gates = scores, scores
    if FORM != 0:
        correction, gates = _calibrated(scores, in_proj_CM, out_proj_MC, m, M, C, FORM, UNITS)
    dgates = _gate_gradients(gates, dweights_TK, indices_TK, t, m, live, scale, K, NORMALISED)
    dscores = dgates
    if FORM != 0:
        dcorrection = dgates if FORM == ADDITIVE else dgates * scores
        if FORM == MULTIPLICATIVE:
            dscores = dgates * (1 + correction)
        for start in range(0, C, UNITS):
            c = start + tl.arange(0, UNITS)
            first, second = _weights(in_proj_CM, out_proj_MC, c, m, M, C)
            h = tl.dot(scores, tl.trans(first), input_precision="ieee")
            share = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
            slope = share + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
            dh = tl.dot(dcorrection, tl.trans(second), input_precision="ieee") * slope
            dscores = tl.dot(dh, first, dscores, input_precision="ieee")
            inside = (c < C)[:, None] & (m < M)[None, :]
            at = program.to(tl.int64) * C * M
            din = tl.dot(tl.trans(dh), scores, input_precision="ieee")
            tl.store(din_PCM + at + c[:, None] * M + m[None, :], din, mask=inside)
            dout = tl.dot(tl.trans(h * share), dcorrection, input_precision="ieee")
            tl.store(dout_PMC + at + m[None, :] * C + c[:, None], dout, mask=inside)
    dlogits = scores * (dscores - tl.sum(scores * dscores, axis=1)[:, None])
    inside = (t < T)[:, None] & (m < M)[None, :]
    tl.store(dlogits_TM + t[:, None] * M + m[None, :], dlogits.to(dlogits_TM.dtype.element_ty), mask=inside)
