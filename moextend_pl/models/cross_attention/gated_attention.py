"""Layers that stand before decoder layers of any family and let their tokens look at pictures, through gates from zero.

Shapes: B rows, S tokens of a pass, D width, K features that a row may look at, H heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moextend_pl.contracts import UserError
from moextend_pl.models.cross_attention.sight import Sight
from moextend_pl.moe.blocks import decoder_layers

WIDER = 4
"""How much wider the inner layer of the feed-forward network is."""


class GatedAttention(nn.Module):
    """Cross-attention and a feed-forward network, each behind a gate tanh(g) with g = 0 at start (arXiv 2204.14198).

    x' = x + tanh(g1) * Attention(norm x, features), x'' = x' + tanh(g2) * FFN(norm x').

    Args:
        width: D.
        heads: H, a divisor of D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_inner = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.inner = nn.Sequential(nn.Linear(width, WIDER * width), nn.GELU(), nn.Linear(WIDER * width, width))
        self.gate, self.gate_inner = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self._looked: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, hidden_BSD: Tensor, features_BKD: Tensor, mask_BSK: Tensor) -> Tensor:
        """Returns (B, S, D); tokens that may look at nothing stay as they are, bit for bit.

        Args:
            hidden_BSD: What the decoder layer would read.
            features_BKD: What each row may look at.
            mask_BSK: What each token may look at.
        """
        sees_BS1 = mask_BSK.any(dim=-1, keepdim=True)
        x_BSD = hidden_BSD.to(self.query.weight.dtype)
        query = self._by_head(self.query(self.norm(x_BSD)))
        key, value = self._keys_and_values(features_BKD.to(x_BSD.dtype))
        # A token without anything to look at looks at all, so that no mean is over nothing; it is left out below.
        mask = (mask_BSK | ~sees_BS1).unsqueeze(1)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        x_BSD = x_BSD + self.gate.tanh() * self.out(seen)
        x_BSD = x_BSD + self.gate_inner.tanh() * self.inner(self.norm_inner(x_BSD))
        return torch.where(sees_BS1, x_BSD.to(hidden_BSD.dtype), hidden_BSD)

    def _by_head(self, x_BKD: Tensor) -> Tensor:
        return x_BKD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _keys_and_values(self, features_BKD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values, which all steps of an answer share."""
        if torch.is_grad_enabled():
            self._looked = None
            return self._by_head(self.key(features_BKD)), self._by_head(self.value(features_BKD))
        if self._looked is None or self._looked[0] is not features_BKD:
            key, value = self._by_head(self.key(features_BKD)), self._by_head(self.value(features_BKD))
            self._looked = (features_BKD, key, value)
        return self._looked[1:]


def looking_layers(count: int, every: int) -> list[int]:
    """Returns the decoder layers before which tokens look, the last of each group (NVLM: 10 of 80 and of 60).

    Args:
        count: Decoder layers of the model.
        every: Size of a group.

    Raises:
        UserError: If there is no whole group.
    """
    if not 1 <= every <= count:
        raise UserError(f"Expected `projector.cross_attention` in 1..{count}, the decoder layers, got {every}.")
    return list(range(every - 1, count, every))


def attach(model: PreTrainedModel, every: int, sight: Sight, compiled: bool = False) -> nn.ModuleList:
    """Lets a model look at pictures, in place; its own modules and the names of its tensors stay.

    Args:
        model: A causal language model.
        every: See `looking_layers`.
        sight: What tokens look at.
        compiled: Whether its layers are to be compiled.

    Returns:
        The new layers.

    Raises:
        UserError: If the model has no layers that are known as such, or they are to be compiled.
    """
    layers, config = decoder_layers(model), model.config.get_text_config()
    if not layers or compiled:
        raise UserError(
            "Expected decoder layers that transformers names as such and that are not compiled for "
            f"`projector.cross_attention`, got those of {type(model).__name__}. Set `compute.compile: false`, or place "
            "pictures among the words."
        )
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    heads = heads if width % heads == 0 else 1
    chosen = looking_layers(len(layers), every)
    new = nn.ModuleList(GatedAttention(width, heads) for _ in chosen)
    for number, gated in zip(chosen, new, strict=True):
        layers[number].register_forward_pre_hook(partial(_look, gated, sight), with_kwargs=True)
    return new


def _look(
    gated: nn.Module, sight: Sight, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if sight.nothing:
        return None  # texts alone never come here
    hidden_BSD = args[0] if args else options["hidden_states"]
    if hidden_BSD.dim() != 3:
        raise UserError(f"{type(layer).__name__} reads several states of a token. Place pictures among the words.")
    rows, tokens, _ = hidden_BSD.shape
    looked = gated(hidden_BSD, sight.shown(rows), sight.mask(rows, tokens))
    return ((looked, *args[1:]), options) if args else (args, {**options, "hidden_states": looked})
