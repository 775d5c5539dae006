"""What is particular about the router of a model family, read off the router itself.

Families of transformers differ in how router logits become weights: softmax or sigmoid, renormalised or
not, scaled, with a bias that only decides the selection, within groups of experts. No list of names is
kept: a twin of the router with random weights is asked to route random tokens, and the facts are those
under which our own routing gives the same experts and weights. A router that no facts explain is refused,
so that no model is ever routed in another way than its own.

Shapes: T tokens, D width, E experts of the layer, K selected per token.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moextend_pl.contracts import UserError
from moextend_pl.moe.routing import Scoring, select, weigh

ARGUMENT = "argument"
PROBE_TOKENS = 64
TOLERANCE = 1e-5
# Names under which the families keep what multiplies the weights, and the size of expert groups.
GROUP_NAMES, TOP_GROUP_NAMES = ("num_group", "n_group"), ("topk_group",)
SOFTCAP_NAMES = ("router_logit_softcapping",)


@dataclass(frozen=True)
class RouterFacts:
    """How a router is built, and how it scores.

    Attributes:
        weight: Dotted name of its (E, D) tensor.
        logit_bias: Dotted name of an (E,) tensor added to the logits, or empty.
        selection_bias: Dotted name of an (E,) tensor added for the selection only, `argument` if the block
            hands it over in each call, or empty.
        softcap: Logits are `softcap * tanh(logits / softcap)`; 0 for none.
        in_fp32: Whether logits are computed in fp32 whatever the type of the model.
        scoring: From logits to selected experts and weights.
        order: Where logits, weights and indices stand in what it returns.
    """

    weight: str
    logit_bias: str
    selection_bias: str
    softcap: float
    in_fp32: bool
    scoring: Scoring
    order: tuple[int, int, int] = (0, 1, 2)


class RouterOutput(NamedTuple):
    """What a router returns, in the order of most families.

    Attributes:
        logits: (T, E) before any score.
        weights: (T, K) routing weights.
        indices: (T, K) selected experts.
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor


def output_order(output: Sequence[Tensor]) -> tuple[int, int, int]:
    """Returns where logits, weights and indices stand in what a router returned.

    Args:
        output: Three tensors; the indices are whole numbers, and logits have more columns than weights.
    """
    numbers = [n for n, value in enumerate(output) if value.is_floating_point()]
    logits, weights = sorted(numbers, key=lambda n: -output[n].shape[-1])
    return logits, weights, 3 - logits - weights


def sort_output(output: Sequence[Tensor]) -> RouterOutput:
    """Returns what a router returned, in the order of most families."""
    return RouterOutput(*(output[n] for n in output_order(output)))


def tensor_named(module: nn.Module, name: str) -> Tensor:
    """Returns the parameter or buffer of a module by its dotted name."""
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), last)
    return tensor


def router_weight(router: nn.Module, num_experts: int) -> str | None:
    """Returns the dotted name of the one (E, D) tensor of a router, or None if there is not exactly one."""
    weights = ((name, p) for name, p in router.named_parameters() if p.is_floating_point())
    names = [name for name, p in weights if p.dim() == 2 and p.shape[0] == num_experts]
    return names[0] if len(names) == 1 else None


def _twin(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Returns a copy on the CPU in fp32 with random tensors and without hooks."""

    def fill(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor if tensor is None or tensor.is_meta else tensor.cpu()
        if tensor.dim() == 2 and min(tensor.shape) > 1:
            return (
                torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
                * tensor.shape[-1] ** -0.5
            )
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float32, device="cpu") * 0.2

    twin: Any = copy.copy(module)
    twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    twin._parameters = {
        name: None if p is None else nn.Parameter(fill(p), requires_grad=False)  # type: ignore[arg-type]
        for name, p in module._parameters.items()
    }
    twin._buffers = {name: fill(buffer) for name, buffer in module._buffers.items()}
    twin._modules = {
        name: None if child is None else _twin(child, generator) for name, child in module._modules.items()
    }
    twin.training = False
    return twin


@dataclass
class _Trial:
    """One forward pass of a twin on random tokens, and what came out."""

    router: nn.Module
    x_TD: Tensor
    argument: Tensor | None
    logits_TE: Tensor
    weights_TK: Tensor
    indices_TK: Tensor
    order: tuple[int, int, int]


def _refuse(router: nn.Module, reason: str) -> UserError:
    return UserError(
        f"{type(router).__name__} cannot be extended: {reason}. Leave its layers out of the extension plan, or take a "
        "base of another family."
    )


def _run(router: nn.Module, x_TD: Tensor, argument: Tensor | None) -> Any:
    extra = () if argument is None else (argument,)
    try:
        return router(x_TD, *extra)
    except (ValueError, IndexError, RuntimeError):
        return router(x_TD.unsqueeze(0), *extra)  # some routers insist on a batch dimension


def _try(router: nn.Module, num_experts: int, name: str) -> _Trial:
    generator = torch.Generator("cpu").manual_seed(0)
    twin: Any = _twin(router, generator)
    if getattr(twin, "top_k", None) == num_experts:
        # Selecting all would show neither what selects nor, of a softmax, whether the weights are normalised.
        twin.top_k = max(num_experts // 2, 1)
    width = tensor_named(router, name).shape[1]
    # Wide enough that top scores differ, and not so wide that a softmax saturates.
    x_TD = torch.randn(PROBE_TOKENS, width, generator=generator, dtype=torch.float32, device="cpu")
    names = list(inspect.signature(router.forward).parameters)[1:]
    argument = torch.rand(num_experts, generator=generator, dtype=torch.float32, device="cpu") * 0.2 if names else None
    if names and "bias" not in names[0]:
        raise _refuse(router, f"its choice depends on more than the token's hidden state ({', '.join(names)})")
    try:
        with torch.no_grad():
            output = _run(twin, x_TD, argument)
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        raise _refuse(router, f"it does not run by itself ({error})") from error
    if not isinstance(output, tuple) or len(output) != 3:
        raise _refuse(router, f"it returns {len(output)} values where the protocol has three")
    logits, weights, indices = (value.reshape(PROBE_TOKENS, -1) for value in sort_output(output))
    if logits.shape[1] != num_experts:
        raise _refuse(router, f"it scores {logits.shape[1]} choices for {num_experts} experts")
    return _Trial(twin, x_TD, argument, logits.float(), weights.float(), indices, output_order(output))


def _close(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool(torch.allclose(left, right, rtol=TOLERANCE, atol=TOLERANCE))


def _near(value: float, stated: list[float]) -> bool:
    return any(math.isclose(value, other, rel_tol=1e-4) for other in stated)


def _attribute(router: nn.Module, names: tuple[str, ...]) -> Any:
    return next((getattr(router, name) for name in names if getattr(router, name, None) is not None), None)


def _logit_facts(trial: _Trial, name: str, others: list[str]) -> tuple[str, float]:
    """Returns the name of the logits' bias and their soft cap."""
    raw_TE = F.linear(trial.x_TD, tensor_named(trial.router, name))
    softcap = float(_attribute(trial.router, SOFTCAP_NAMES) or 0.0)
    for bias in ("", *others):
        shifted_TE = raw_TE + tensor_named(trial.router, bias).reshape(-1) if bias else raw_TE
        if _close(trial.logits_TE, shifted_TE):
            return bias, 0.0
        if softcap and _close(trial.logits_TE, softcap * (shifted_TE / softcap).tanh()):
            return bias, softcap
    raise _refuse(trial.router, "its logits are not a product of hidden state and one weight matrix")


def _candidates(router: nn.Module) -> Iterator[Scoring]:
    groups, top_groups = _attribute(router, GROUP_NAMES), _attribute(router, TOP_GROUP_NAMES)
    jitter = float(getattr(router, "router_jitter_noise", 0.0))
    grouped = [("top2", "inf"), ("max", "zero"), ("top2", "zero")] if groups and groups > 1 else []
    for score, normalised, biased in itertools.product(
        ("softmax", "sigmoid", "sqrtsoftplus"), (True, False), ("scores", "logits")
    ):
        plain = Scoring(score, normalised, biased=biased)
        for group_score, fill in grouped:
            yield replace(plain, groups=groups, top_groups=top_groups, group_score=group_score, group_fill=fill)
        yield plain
    yield Scoring("sparsemixer", normalised=False, jitter=jitter)


def _explains(trial: _Trial, scoring: Scoring, bias_E: Tensor | None) -> float | None:
    """Returns the scale under which a scoring gives the router's own experts and weights, or None."""
    top_k = trial.weights_TK.shape[1]
    scores_TE, indices_TK = select(trial.logits_TE, top_k, scoring, bias_E)
    order, own_order = indices_TK.argsort(dim=-1), trial.indices_TK.argsort(dim=-1)
    if not torch.equal(indices_TK.gather(1, order), trial.indices_TK.gather(1, own_order)):
        return None
    weights_TK = weigh(scores_TE.gather(1, indices_TK), scoring).gather(1, order)
    own_TK = trial.weights_TK.gather(1, own_order)
    scale = float(own_TK.sum() / weights_TK.sum())
    if not _close(own_TK, weights_TK * scale):
        return None
    # The number as the router has it, not as rounding left it.
    stated = [1.0, *(value for value in vars(trial.router).values() if isinstance(value, float))]
    return min(stated, key=lambda value: abs(value - scale)) if _near(scale, stated) else scale


def _computes_in_fp32(trial: _Trial, name: str) -> bool:
    weight_ED, x_TD = tensor_named(trial.router, name).bfloat16(), trial.x_TD.bfloat16()
    twin = copy.deepcopy(trial.router).bfloat16()
    try:
        with torch.no_grad():
            logits_TE = sort_output(_run(twin, x_TD, trial.argument)).logits.reshape(PROBE_TOKENS, -1)
    except RuntimeError:
        return False
    if logits_TE.dtype != torch.float32:
        return False
    exact_TE = F.linear(x_TD.float(), weight_ED.float())
    rounded_TE = F.linear(x_TD, weight_ED).float()
    return bool((logits_TE - exact_TE).abs().sum() < (logits_TE - rounded_TE).abs().sum())


def read_facts(router: nn.Module, num_experts: int) -> RouterFacts:
    """Finds out how a router of the base scores.

    Args:
        router: A router of a transformers model, on any device, `meta` included.
        num_experts: E.

    Returns:
        The facts under which `routing.select` and `routing.weigh` repeat what it does.

    Raises:
        UserError: If none do; the sentence says what is particular about it.
    """
    # Also where a model is built without memory: the twin is small and computes.
    with torch.device("cpu"):
        return _read_facts(router, num_experts)


def _read_facts(router: nn.Module, num_experts: int) -> RouterFacts:
    name = router_weight(router, num_experts)
    if name is None:
        raise _refuse(router, "it has no single weight matrix with one row for each expert")
    trial = _try(router, num_experts, name)
    vectors = itertools.chain(trial.router.named_parameters(), trial.router.named_buffers())
    others = [n for n, tensor in vectors if n != name and tensor.numel() == num_experts]
    logit_bias, softcap = _logit_facts(trial, name, others)
    selection = [n for n in others if n != logit_bias]
    biases = [ARGUMENT] if trial.argument is not None else [*selection, ""]
    for bias, scoring in itertools.product([*biases, ""], _candidates(trial.router)):
        tensor = trial.argument if bias == ARGUMENT else tensor_named(trial.router, bias) if bias else None
        scale = _explains(trial, scoring, None if tensor is None else tensor.reshape(-1))
        if scale is not None:
            in_fp32 = _computes_in_fp32(trial, name)
            return RouterFacts(
                name, logit_bias, bias, softcap, in_fp32, replace(scoring, scale=scale), order=trial.order
            )
    raise _refuse(router, "its weights follow from its logits in none of the known ways")
