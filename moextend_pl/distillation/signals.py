"""What one pass of a language model lets another learn from: logits, hidden states, attention, choices of experts.

Shapes: B batch, S sequence, D width, V vocabulary, H heads, A positions whose logits are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moextend_pl.models.language import MoELanguageModel
from moextend_pl.moe.usage import RouterRecord


@dataclass
class Signals:
    """What was heard of one pass.

    Attributes:
        logits: (A, V), as the model gives them, scaled or capped where its family does that.
        hidden: (B * S, D), what goes into the head: last hidden states, normalised.
        attention: (B * S, H, S) attention weights of the last layer; None unless they were asked for.
        routers: One record for each router, by rising layer.
        length: S.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    attention: Tensor | None = None
    routers: list[RouterRecord] = field(default_factory=list)
    length: int = 0


def last_attention(model: nn.Module) -> nn.Module | None:
    """Returns the attention module of the last decoder layer, the last one named `self_attn` or `attention`."""
    found = [part for name, part in model.named_modules() if name.rsplit(".", 1)[-1] in ("self_attn", "attention")]
    return found[-1] if found else None


@contextmanager
def hearing(language: MoELanguageModel, attention: bool = False) -> Iterator[Signals]:
    """Hears what the next pass of a language model says, with gradients where they are on.

    Args:
        language: A built model.
        attention: Whether attention weights are kept too; its attention is `eager` then.
    """
    signals = Signals()

    def hear_hidden(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        signals.hidden, signals.length = args[0].flatten(0, 1), args[0].shape[1]

    def hear_logits(_: nn.Module, __: object, output: Any) -> None:
        signals.logits = output.logits

    def hear_attention(_: nn.Module, __: object, output: tuple[Tensor, ...]) -> None:
        signals.attention = output[1].transpose(1, 2).flatten(0, 1)

    head: Any = language.model.get_output_embeddings()
    with ExitStack() as stack:
        # Before the hook that chooses positions: all hidden states are heard.
        stack.callback(head.register_forward_pre_hook(hear_hidden).remove)
        stack.callback(language.model.register_forward_hook(hear_logits).remove)
        if attention and (last := last_attention(language.model)) is not None:
            stack.callback(last.register_forward_hook(hear_attention).remove)
        signals.routers = stack.enter_context(language.watch.recording())
        yield signals
