"""How answers are generated, as plain options."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from moextend_pl.contracts import UserError
from moextend_pl.inference.reduction import Reduction

DEFAULT_NEW_TOKENS = 256
"""Longest answer where neither the user nor the base's generation_config.json says one."""


@dataclass(frozen=True)
class GenerationSpec:
    """How answers are generated.

    Attributes:
        max_new_tokens: Longest answer, in tokens; None for what the base's generation_config.json says, else 256. An
            answer ends where the model's context ends in any case.
        temperature: 0 takes the most probable token; above 0 tokens are drawn, the more evenly the higher it is.
        top_k: Draw among this many most probable tokens; None for all.
        top_p: Draw among the most probable tokens that have this probability together; 1 for all.
        beams: How many beginnings of an answer are followed at a time; 1 for one.
        stop: Texts at which an answer ends, before them.
        seed: Of what is drawn. An answer then depends on the seed and its own prompt alone, whatever else is asked
            in the same batch; None draws one for each question out of torch's generator, also for equal questions.
        reduce: How picture tokens become fewer, see `Reduction.parse`; None keeps all of them.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    beams: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    reduce: str | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for name, least in (("max_new_tokens", 1), ("top_k", 1), ("beams", 1), ("seed", 0), ("temperature", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise UserError(f"Expected `{name}` of at least {least}, got {value}.")
        Reduction.parse(self.reduce)
        if not 0 < self.top_p <= 1:
            raise UserError(f"Expected `top_p` above 0 and at most 1, got {self.top_p}.")
        if not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"Expected texts as `stop`, none of them empty, got {list(stop)}.")
        drawn = self.top_k is not None or self.top_p < 1
        if drawn and not self.temperature:
            raise UserError(
                "`top_k` and `top_p` choose among what is drawn, but `temperature` is 0 and nothing is. Set "
                "`temperature`, for example to 1, or leave them out."
            )
        if self.beams > 1 and self.temperature:
            raise UserError("Expected `beams` or `temperature`, got both: beams draw nothing. Leave one out.")

    def with_options(self, options: dict[str, Any]) -> GenerationSpec:
        """Returns the same with some options changed.

        Args:
            options: By name.

        Raises:
            UserError: If there is no such option, or a value is out of its range.
        """
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean `{close[0]}`?" if close else f"Choose among {', '.join(known)}."
                raise UserError(f"There is no option `{name}` of generation; {hint}")
        return replace(self, **options)
