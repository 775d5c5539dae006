"""Published recipes as lists of terms."""

from __future__ import annotations

from collections.abc import Callable

from moextend_pl.contracts import UserError
from moextend_pl.distillation.losses import DistillTerm, HiddenTerm, LogitTerm
from moextend_pl.distillation.relations import RelationTerm


def llava_kd() -> list[DistillTerm]:
    """Returns LLaVA-KD's terms beside cross-entropy (arXiv 2410.16236), with the weights of the trainer's source."""
    return [LogitTerm(scope="answer"), LogitTerm(scope="image"), RelationTerm()]


def llavadi() -> list[DistillTerm]:
    """Returns the best of LLAVADI's diary (arXiv 2407.19409): answers alone, shifted, sample by sample."""
    return [LogitTerm(5.0, "answer", mean="samples"), HiddenTerm(5.0, "answer", mean="samples")]


def llavadi_shipped() -> list[DistillTerm]:
    """Returns the recipe that LLAVADI's release ships: standardised logits and hidden states of all tokens."""
    return [LogitTerm(scope="all", standardise=True, mean="samples"), HiddenTerm(scope="all", mean="samples")]


PRESETS: dict[str, Callable[[], list[DistillTerm]]] = {
    "llava_kd": llava_kd,
    "llavadi": llavadi,
    "llavadi_shipped": llavadi_shipped,
}


def chosen_terms(terms: str | list[DistillTerm]) -> list[DistillTerm]:
    """Returns the terms of a preset, or those that are listed.

    Args:
        terms: Name of a preset, or terms.

    Raises:
        UserError: If there is no such preset, there is no term, or two are the same.
    """
    if isinstance(terms, str):
        if terms not in PRESETS:
            raise UserError(f"Expected `terms` as a list or one of {list(PRESETS)}, got {terms!r}. Correct it.")
        return PRESETS[terms]()
    names = [term.name for term in terms]
    if not names or len(set(names)) < len(names):
        raise UserError(f"Expected `terms` to list at least one term, and each of them once, got {names}. Correct it.")
    return list(terms)
