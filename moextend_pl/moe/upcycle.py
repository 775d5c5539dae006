"""Dense MLPs become mixtures of experts that start as the MLP: in a vision tower, a projector or a language model.

The result is the block of transformers v5: a router returning `(logits, weights, indices)` and an `experts`
module with 3-D weights, so that usage, balance loss and the extension work on it as on any other.

Shapes: B sequences, N tokens of a sequence, T = B * N tokens, D width in, O width out, I hidden width (2 I where
gate and up projection are stacked), E experts, K selected per token, S = T * K pairs of token and expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moextend_pl.contracts import UpcycleSpec, UserError
from moextend_pl.moe.dense_mlp import DenseMLP, find_mlps

ALIGNMENT = 16
"""Bytes that rows of a matrix must divide into for torch's grouped product."""


class UpcycledRouter(nn.Module):
    """Chooses experts by softmax in fp32; weights of the K best are divided by their sum (CuMo, section 3.2).

    Args:
        width: D.
        spec: Number of experts and K.
        like: Tensor whose type and device the weight gets.
        seed: Seed of the weight, drawn as `nn.Linear` does.
    """

    def __init__(self, width: int, spec: UpcycleSpec, like: Tensor, seed: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = spec.experts, spec.top_k
        self.weight = nn.Parameter(_uniform((spec.experts, width), width, like, seed))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Routes tokens.

        Args:
            hidden_states: (T, D) or (B, N, D).

        Returns:
            Logits (T, E) before softmax, routing weights (T, K) in fp32 and expert indices (T, K), best first.
        """
        logits_TE = F.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight)
        probs_TK, indices_TK = logits_TE.float().softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits_TE, probs_TK / probs_TK.sum(dim=-1, keepdim=True), indices_TK


class UpcycledExperts(nn.Module):
    """E copies of an MLP in 3-D tensors, computed together by grouped products; gated or not, biased or not.

    An index equal to the number of experts is skipped where `_is_expert_parallel` is set, as in transformers.

    Args:
        mlp: The MLP to copy.
        spec: Number of experts, and whether they start at random.
        seed: Seed of experts from scratch.
    """

    def __init__(self, mlp: DenseMLP, spec: UpcycleSpec, seed: int) -> None:
        super().__init__()
        self.num_experts = spec.experts
        self.has_gate, self.act_fn = mlp.gate is not None, mlp.act
        self._is_expert_parallel = False
        first = [mlp.up] if mlp.gate is None else [mlp.gate, mlp.up]
        name = "up_proj" if mlp.gate is None else "gate_up_proj"
        for target, maps in ((name, first), ("down_proj", [mlp.down])):
            for suffix, attribute in (("", "weight"), ("_bias", "bias")):
                dense = [getattr(linear, attribute) for linear in maps]
                stacked = None if dense[0] is None else torch.cat([value.detach() for value in dense])
                self.register_parameter(target + suffix, self._members(stacked, maps[0].in_features, spec, seed))
                seed += 1

    @staticmethod
    def _members(dense: Tensor | None, fan_in: int, spec: UpcycleSpec, seed: int) -> nn.Parameter | None:
        if dense is None:
            return None
        shape = (spec.experts, *dense.shape)
        return nn.Parameter(
            _uniform(shape, fan_in, dense, seed) if spec.from_scratch else dense.unsqueeze(0).expand(shape).clone()
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes the weighted sum of the selected experts.

        Args:
            hidden_states: (T, D).
            top_k_index: (T, K) expert indices.
            top_k_weights: (T, K) routing weights.

        Returns:
            (T, O).
        """
        tokens, top_k = top_k_index.shape
        experts_S, order_S = top_k_index.reshape(-1).sort(stable=True)
        counts_E = (experts_S.unsqueeze(1) == torch.arange(self.num_experts, device=experts_S.device)).sum(dim=0)
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        skipped_S1 = (experts_S >= self.num_experts).unsqueeze(1) if self._is_expert_parallel else None
        experts_S = experts_S.clamp(max=self.num_experts - 1)
        x_SD = _without(hidden_states[order_S // top_k], skipped_S1)
        hidden_SI = self._linear("gate_up_proj" if self.has_gate else "up_proj", x_SD, offsets_E, experts_S)
        hidden_SI = _without(hidden_SI, skipped_S1)
        if self.has_gate:
            gate_SI, up_SI = hidden_SI.chunk(2, dim=-1)
            hidden_SI = self.act_fn(gate_SI) * up_SI
        else:
            hidden_SI = self.act_fn(hidden_SI)
        y_SO = self._linear("down_proj", hidden_SI, offsets_E, experts_S)
        y_SO = _without(y_SO, skipped_S1) * top_k_weights.reshape(-1)[order_S].unsqueeze(1)
        # Back to the order of the tokens and summed in it: the same result in every run, unlike atomic additions.
        back_S = torch.empty_like(order_S)
        back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        return y_SO[back_S].reshape(tokens, top_k, y_SO.shape[-1]).sum(dim=1).to(hidden_states.dtype)

    def _linear(self, name: str, x_SD: Tensor, offsets_E: Tensor, experts_S: Tensor) -> Tensor:
        # A module of new experts that the extension makes from this one has no entry for a bias that is None.
        return _grouped_linear(x_SD, getattr(self, name), getattr(self, f"{name}_bias", None), offsets_E, experts_S)


def _without(rows_SD: Tensor, skipped_S1: Tensor | None) -> Tensor:
    # The grouped product leaves rows past its last group as they were in memory, which may be NaN.
    return rows_SD if skipped_S1 is None else rows_SD.masked_fill(skipped_S1, 0.0)


def _grouped_linear(
    x_SD: Tensor, weight_EID: Tensor, bias_EI: Tensor | None, offsets_E: Tensor, experts_S: Tensor
) -> Tensor:
    kind = x_SD.device.type
    # torch's grouped product takes no part in autocast by itself; the meta device knows no autocast.
    mixed = not x_SD.is_meta and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if mixed else weight_EID.dtype
    x_SD, weight_EID = x_SD.to(dtype), weight_EID.to(dtype)
    if x_SD.is_meta:
        # One expert's product has the shape of all: torch 2.11 groups no fp32 there.
        y_SI = x_SD @ weight_EID[0].T
    elif x_SD.shape[-1] * x_SD.element_size() % ALIGNMENT or weight_EID.shape[1] * x_SD.element_size() % ALIGNMENT:
        y_SI = _looped_product(x_SD, weight_EID, offsets_E)
    else:
        y_SI = F.grouped_mm(x_SD, weight_EID.transpose(-2, -1), offs=offsets_E)
    return y_SI if bias_EI is None else y_SI + F.embedding(experts_S, bias_EI).to(dtype)


def _looped_product(x_SD: Tensor, weight_EID: Tensor, offsets_E: Tensor) -> Tensor:
    ends = offsets_E.tolist()
    groups = [x_SD[a:b] @ weight_ID.T for a, b, weight_ID in zip([0, *ends], ends, weight_EID, strict=False)]
    return torch.cat([*groups, x_SD.new_zeros(len(x_SD) - ends[-1], weight_EID.shape[1])])


class UpcycledMLP(nn.Module):
    """Stands where the MLP stood.

    Args:
        mlp: The dense MLP.
        spec: How it is upcycled.
        index: Number of the MLP among those of its part; keeps the routers of different layers apart.
    """

    def __init__(self, mlp: DenseMLP, spec: UpcycleSpec, index: int = 0) -> None:
        super().__init__()
        seed = layer_seed(spec, index)
        self.gate = UpcycledRouter(mlp.up.in_features, spec, mlp.up.weight, seed)
        self.experts = UpcycledExperts(mlp, spec, seed + 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Computes (B, N, O) from (B, N, D), or (T, O) from (T, D); all tokens together."""
        _, weights_TK, indices_TK = self.gate(hidden_states)
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        y_TO = self.experts(x_TD, indices_TK, weights_TK)
        return y_TO.reshape(*hidden_states.shape[:-1], y_TO.shape[-1])


def layer_seed(spec: UpcycleSpec, index: int) -> int:
    """Returns the seed of the router of the MLP of that number; those that follow it are its experts'."""
    return 1000 * (1000 * spec.seed + index)


def agreed_spec(earlier: UpcycleSpec | None, asked: UpcycleSpec | None, what: str) -> UpcycleSpec | None:
    """Returns how a part is upcycled that may have been so before: as asked, else as before.

    Args:
        earlier: How its tensors were upcycled, or None.
        asked: What this stage asks for, or None.
        what: The part, for the error message.

    Raises:
        UserError: If the two do not have the same experts.
    """
    if earlier is not None and asked is not None and _structure(earlier) != _structure(asked):
        raise UserError(
            f"{what} is upcycled already, as {earlier}. Expected the same of its `upcycle`, or none, got {asked}."
        )
    return asked or earlier


def upcycled_before(parts: Mapping[str, Any], earlier: Mapping[str, Mapping[str, Any]], origin: str) -> list[Any]:
    """Returns the parts that an earlier stage had upcycled, to be upcycled alike.

    Args:
        parts: Those that may be, by name; each has its `upcycle_spec`.
        earlier: What that stage's manifest says of each.
        origin: Where the stage lies, for the error message.

    Raises:
        UserError: As `agreed_spec`.
    """
    found = []
    for name, part in parts.items():
        spec = UpcycleSpec.from_dict(earlier.get(name, {}).get("upcycle"))
        if spec is not None:
            part.upcycle_spec = agreed_spec(spec, part.upcycle_spec, f"{origin}: the {name}")
            found.append(part)
    return found


def _structure(spec: UpcycleSpec) -> tuple[int, int, tuple[int, ...] | None]:
    """Returns what decides which tensors there are and what they compute."""
    return spec.experts, spec.top_k, None if spec.layers is None else tuple(sorted(spec.layers))


def upcycle(model: nn.Module, spec: UpcycleSpec) -> None:
    """Turns MLPs of a model into experts, in place; a model that has been upcycled stays as it is.

    Args:
        model: A timm or transformers model.
        spec: Which MLPs, and into what.

    Raises:
        UserError: If the model has no such MLPs, or not the layers that are named.
    """
    if upcycled_mlps(model):
        return
    found = find_mlps(model)
    if not found:
        raise UserError(
            f"Expected a model whose numbered blocks hold MLPs of two or three linear maps, found none in "
            f"{type(model).__name__}. A vision transformer (CLIP, SigLIP, timm vit) or a dense Llama, Mistral or Qwen "
            "has them; take one of these, or remove `upcycle`."
        )
    chosen = range(len(found)) if spec.layers is None else spec.layers
    if not chosen or any(not 0 <= index < len(found) for index in chosen):
        raise UserError(f"Expected `layers` of `upcycle` in 0..{len(found) - 1}, got {list(chosen)}.")
    for index, (path, mlp) in enumerate(found.items()):
        if index in chosen:
            _check_reading(path, model.get_submodule(path), mlp)
            model.set_submodule(path, UpcycledMLP(mlp, spec, index))


def upcycled_mlps(model: nn.Module) -> list[tuple[str, UpcycledMLP]]:
    """Lists the upcycled MLPs of a model with their paths, in the order of the blocks."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, UpcycledMLP)]


@torch.no_grad()
def _check_reading(path: str, module: nn.Module, mlp: DenseMLP) -> None:
    """Refuses an MLP that computes something else than its structure says, before anything is lost."""
    weight = mlp.up.weight
    if weight.is_meta:
        return
    x_TD = torch.randn(4, mlp.up.in_features, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(weight)
    as_it_is: Callable[[Tensor], Tensor] = module
    if not torch.allclose(as_it_is(x_TD), mlp(x_TD), rtol=1e-2, atol=1e-3):
        raise UserError(
            f"The MLP at {path} ({type(module).__name__}) does more than its linear maps and its activation say; it "
            "cannot be upcycled. Leave its layer out of `upcycle.layers`, or take another model."
        )


def _uniform(shape: tuple[int, ...], fan_in: int, like: Tensor, seed: int) -> Tensor:
    """Draws as `nn.Linear` does, uniform within 1 / sqrt(fan_in); the same on any device and after any other draw."""
    if like.is_meta:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    drawn = torch.rand(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") * 2 - 1
    return (drawn / fan_in**0.5).to(like)
