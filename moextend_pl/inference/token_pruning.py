"""AIM, second half, in a model: picture tokens leave the sequence layer by layer while a prompt is read.

They are dropped, not masked: later layers compute and cache fewer tokens. Positions stay as they were.

Shapes: B rows (prompts, or their beams), S tokens of a prompt, N tokens that a layer reads, K tokens of its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from moextend_pl.contracts import UserError
from moextend_pl.inference.reduction import Reduction
from moextend_pl.inference.token_importance import importance, kept_share, most_important
from moextend_pl.moe.blocks import decoder_layers
from moextend_pl.moe.extension.extended_router import ExtendedRouter
from moextend_pl.samples.packing import layer_kinds

RATED_ATTENTION = "moextend_rated"
"""Name under which transformers knows `rated_attention` once it was registered."""

WHOLE_ATTENTION = {"full_attention", "attention"}


def rated_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Computes attention as `sdpa` does, and lets a `Pruning` rate the tokens where it asks for it."""
    rate = options.pop("rate", None)
    if rate is not None:
        rate(query, key, attention_mask, options.get("scaling"))
    attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return attended


def check_prunable(model: PreTrainedModel, first: int, last: int) -> None:
    """Refuses a model whose layers cannot read fewer and fewer tokens.

    Args:
        model: A causal language model.
        first: l1, the layer after which the first tokens are dropped.
        last: l2; after the layer before it no picture token is left.

    Raises:
        UserError: If attention is another one than `sdpa`, layers read through a window or carry a state, have
            a static cache, are compiled, or are not known as layers, or the two numbers are none of its layers.
    """
    config: Any = model.config.get_text_config()
    layers, name = decoder_layers(model), type(model).__name__
    advice = "Merge alone (`aim_merge`), or reduce nothing."
    if model.config._attn_implementation != "sdpa":
        found = model.config._attn_implementation
        raise UserError(f"Dropping tokens needs `attn_implementation: sdpa`, got {found!r}. {advice}")
    windowed = getattr(config, "sliding_window", None) is not None and not layer_kinds(config)
    if layer_kinds(config) - WHOLE_ATTENTION or windowed or len(layers) != config.num_hidden_layers:
        raise UserError(
            f"Dropping tokens needs layers that read all tokens before them, and {name} has others. {advice}"
        )
    cache = getattr(model.generation_config, "cache_implementation", None)
    if cache in ALL_STATIC_CACHE_IMPLEMENTATIONS:
        raise UserError(f"Dropping tokens needs a cache that grows, got `cache_implementation: {cache}`. {advice}")
    if any(layer._compiled_call_impl is not None for layer in layers):
        raise UserError(f"Dropping tokens needs layers that are not compiled. Load the model without it. {advice}")
    if not 0 <= first < last <= len(layers):
        raise UserError(
            f"Expected layers of {name} between which tokens are dropped, 0 <= first < last <= {len(layers)}, got "
            f"{first} and {last}."
        )


@contextmanager
def pruned(model: PreTrainedModel, first: int, last: int, is_image_BS: Tensor, real_BS: Tensor) -> Iterator[Pruning]:
    """Lets a model drop picture tokens in the next prompts that it reads, and in what it generates behind them.

    Args:
        model: A causal language model.
        first: See `check_prunable`.
        last: See `check_prunable`.
        is_image_BS: True on picture tokens of the prompts.
        real_BS: True on all their tokens but padding, which stands on the left.

    Yields:
        What knows the tokens that each layer reads.

    Raises:
        UserError: See `check_prunable`.
    """
    check_prunable(model, first, last)
    AttentionInterface.register(RATED_ATTENTION, rated_attention)
    AttentionMaskInterface.register(RATED_ATTENTION, sdpa_mask)
    pruning = Pruning(model, (first, last), is_image_BS.bool(), real_BS.bool())
    model.set_attn_implementation(RATED_ATTENTION)
    try:
        with pruning.attached(decoder_layers(model)):
            yield pruning
    finally:
        model.set_attn_implementation("sdpa")
        pruning.restore()


def dropping(
    model: PreTrainedModel, reduce: str | None, is_image_BS: Tensor, real_BS: Tensor
) -> AbstractContextManager[Pruning | None]:
    """Returns a context in which a model drops picture tokens as a reduction says; texts alone are left as they are.

    Args:
        model: A causal language model.
        reduce: See `Reduction.parse`.
        is_image_BS: True on picture tokens.
        real_BS: True on all tokens but padding.
    """
    reduction = Reduction.parse(reduce)
    if not reduction.drops or not bool(is_image_BS.any()):
        return nullcontext()
    return pruned(model, *reduction.layers(len(decoder_layers(model))), is_image_BS, real_BS)


class Pruning:
    """Drops the least important picture tokens after each layer of a span.

    Args:
        model: A causal language model.
        span: l1 and l2.
        is_image_BS: True on picture tokens.
        real_BS: True on all tokens but padding.

    Attributes:
        places: For each layer of the last prompt the (B, N) places of the tokens that it read; a shorter row has
            padding on its left.
        real: For each layer (B, N), False on that padding.
    """

    def __init__(self, model: PreTrainedModel, span: tuple[int, int], is_image_BS: Tensor, real_BS: Tensor) -> None:
        self.span, self.is_image_BS, self.real_BS = span, is_image_BS, real_BS
        self.reaches = {id(m.reach): m.reach for m in model.modules() if isinstance(m, ExtendedRouter)}
        self.places: list[Tensor] = []
        self.real: list[Tensor] = []
        self._ratings: Tensor | None = None
        self._generated = -1

    @contextmanager
    def attached(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Stands before and behind each layer."""
        with ExitStack() as stack:
            for number, layer in enumerate(layers):
                before, behind = partial(self._before, number), partial(self._behind, number)
                stack.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(behind))
            yield

    def restore(self) -> None:
        """Lets masks of new experts be about all tokens again."""
        for reach in self.reaches.values():
            reach.only(None)

    def _before(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if layer == 0:
            self._generated += 1
            self.restore()
        if self._generated:
            mask = self._mask_behind(layer, options["attention_mask"])
            return args, {**options, "attention_mask": mask}
        if layer == 0:
            self._begin(args[0])
        places_BN = self.places[layer]
        if places_BN.shape[1] < self.is_image_BS.shape[1]:
            options = _of_places(options, places_BN, self.real[layer], self.is_image_BS.shape[1])
            for reach in self.reaches.values():
                reach.only(places_BN)
        if kept_share(layer, *self.span) < 1:
            options = {**options, "rate": partial(self._rate, layer)}
        return args, options

    def _begin(self, hidden_BSD: Tensor) -> None:
        beams = len(hidden_BSD) // len(self.is_image_BS)
        self.is_image_BS, self.real_BS = (t.repeat_interleave(beams, dim=0) for t in (self.is_image_BS, self.real_BS))
        every_BS = torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device).expand(len(hidden_BSD), -1)
        self.places, self.real = [every_BS], [self.real_BS]

    def _rate(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        tokens, scale = query.shape[2], query.shape[-1] ** -0.5 if scaling is None else scaling
        closed = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1) if mask is None else ~mask
        closed = closed.expand(len(query), 1, tokens, tokens)[:, 0] | ~self.real[layer][:, None]
        each = query.shape[1] // key.shape[1]
        heads = (
            (query[:, head] @ key[:, head // each].transpose(1, 2) * scale).masked_fill(closed, float("-inf"))
            for head in range(query.shape[1])
        )
        self._ratings = importance(heads, self.real[layer])

    def _behind(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._generated:
            return None
        share, places_BN, real_BN = kept_share(layer, *self.span), self.places[layer], self.real[layer]
        if share == 1:
            self.places.append(places_BN)
            self.real.append(real_BN)
            return None
        if self._ratings is None:
            raise UserError(
                f"{type(module).__name__} computes attention in a way of its own. Merge alone (`aim_merge`)."
            )
        is_image_BN = self.is_image_BS.gather(1, places_BN) & real_BN
        counts_B = (self.is_image_BS.sum(dim=1).double() * share).long()
        kept_BN = most_important(self._ratings, is_image_BN, counts_B) | (real_BN & ~is_image_BN)
        self._ratings = None
        # False stands before True and each kind in its order: what is kept comes to the right end.
        at_BN = kept_BN.int().argsort(dim=1, stable=True)[:, -int(kept_BN.sum(dim=1).max()) :]
        self.places.append(places_BN.gather(1, at_BN))
        self.real.append(kept_BN.gather(1, at_BN))
        hidden_BND = output[0] if isinstance(output, tuple) else output
        hidden_BND = hidden_BND.gather(1, at_BN.unsqueeze(-1).expand(-1, -1, hidden_BND.shape[-1]))
        return (hidden_BND, *output[1:]) if isinstance(output, tuple) else hidden_BND

    def _mask_behind(self, layer: int, mask: Tensor | None) -> Tensor | None:
        """Returns which tokens of its cache, and of those behind the prompt, a layer reads."""
        places_BN, real_BN, prompt = self.places[layer], self.real[layer], self.is_image_BS.shape[1]
        if places_BN.shape[1] == prompt or (mask is None and bool(real_BN.all())):
            return mask
        seen_BK = torch.cat([real_BN, real_BN.new_ones(len(real_BN), self._generated)], dim=1)
        if mask is not None:
            later_BG = torch.arange(prompt, mask.shape[-1], device=mask.device).expand(len(places_BN), -1)
            at_BK = torch.cat([places_BN, later_BG], dim=1)
            seen_BK = seen_BK & mask.expand(len(places_BN), -1, -1, -1)[:, 0, 0].gather(1, at_BK)
        return seen_BK[:, None, None]


def _of_places(options: dict[str, Any], places_BN: Tensor, real_BN: Tensor, prompt: int) -> dict[str, Any]:
    """Returns what a layer is told, for the tokens that are left.

    Raises:
        UserError: If it is told something of every token that is not known here.
    """
    found = dict(options)
    for name in ("position_embeddings", "position_ids", "cache_position"):
        told = options.get(name)
        if isinstance(told, tuple):
            found[name] = tuple(_at(each, places_BN) for each in told)
        elif isinstance(told, Tensor):
            found[name] = _at(told, places_BN) if told.dim() > 1 else told[: places_BN.shape[1]]
    found["attention_mask"] = _mask_of_places(options["attention_mask"], places_BN, real_BN)
    unknown = [n for n, t in options.items() if isinstance(t, Tensor) and t is found[n] and prompt in t.shape]
    if unknown:
        raise UserError(f"This family tells its layers `{unknown[0]}` of every token. Merge alone (`aim_merge`).")
    return found


def _at(told: Tensor, places_BN: Tensor) -> Tensor:
    """Returns (B, N, ...) of a tensor (B or 1, S, ...)."""
    index = places_BN.reshape(*places_BN.shape, *[1] * (told.dim() - 2)).expand(-1, -1, *told.shape[2:])
    return told.expand(len(places_BN), *told.shape[1:]).gather(1, index)


def _mask_of_places(mask: Tensor | None, places_BN: Tensor, real_BN: Tensor) -> Tensor | None:
    """Returns which of the tokens that are left read each other; each reads itself, padding too."""
    rows, tokens = places_BN.shape
    if mask is None and bool(real_BN.all()):
        return None  # sdpa's own causal mask: tokens stand in their order
    itself_NN = torch.eye(tokens, dtype=torch.bool, device=places_BN.device)
    if mask is None:
        seen_BNN = (places_BN[:, :, None] >= places_BN[:, None]) & real_BN[:, None]
    else:
        row_BNS = _at(mask.expand(rows, -1, -1, -1)[:, 0], places_BN)
        seen_BNN = row_BNS.gather(2, places_BN[:, None].expand(-1, tokens, -1)) & real_BN[:, None]
    return (seen_BNN | itself_NN).unsqueeze(1)
