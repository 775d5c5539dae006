"""Terms by name, as YAML lists them: what is compared, on which tokens, with what weight.

Every mean is one over the global batch. Shapes: A positions whose logits are computed, V vocabulary, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moextend_pl.contracts import UserError
from moextend_pl.distillation import terms
from moextend_pl.distillation.scopes import SCOPES, Scope
from moextend_pl.distillation.signals import Signals
from moextend_pl.models.fusion import dense_layers
from moextend_pl.training.losses import global_mean

DIVERGENCES = {
    "forward": terms.forward_kl,
    "reverse": terms.reverse_kl,
    "jsd": terms.jensen_shannon,
    "mse": terms.squared_error,
}
MEANS = ("tokens", "samples")
Scopes = dict[str, Scope]


def mean_over(scope: Scope, values_T: Tensor, mean: str) -> Tensor:
    """Averages what is said of the tokens of a scope over the global batch.

    Args:
        scope: Whose tokens.
        values_T: One value a token.
        mean: `tokens`: all weigh alike. `samples`: the mean over samples of the means over their tokens, 0 for a sample
            that has none (LLAVADI).

    Returns:
        A scalar.
    """
    if mean == "tokens":
        return global_mean(values_T.sum(), values_T.new_full((), len(values_T)))
    means = [own.mean() for own in scope.by_sample(values_T) if len(own)]
    total = torch.stack(means).sum() if means else values_T.sum()
    return global_mean(total, values_T.new_full((), len(scope.counts)))


def heard(signal: Tensor | None) -> Tensor:
    """Returns what was heard; a term that reads what nobody listened for is a mistake of the code."""
    assert signal is not None
    return signal


class DistillTerm(ABC):
    """One term of the loss; subclasses say what is compared.

    Args:
        weight: What it is multiplied by.
        scope: Whose tokens, one of `SCOPES`.
        mean: See `mean_over`.

    Raises:
        UserError: If an option is not allowed.
    """

    name = ""
    needs_attention = False
    needs_routers = False
    needs_logits = False

    def __init__(self, weight: float, scope: str, mean: str = "tokens") -> None:
        if not weight > 0:
            raise UserError(f"Expected `weight` of {type(self).__name__} > 0, got {weight}. Leave the term out.")
        check_choice(self, "scope", scope, SCOPES)
        check_choice(self, "mean", mean, MEANS)
        self.weight, self.scope, self.mean = weight, scope, mean

    @property
    def scopes(self) -> set[str]:
        """The scopes that it reads."""
        return {self.scope}

    def facts(self) -> dict[str, object]:
        """Returns its options as plain values: a run goes on with the same ones only."""
        return {"term": type(self).__name__, **vars(self)}

    def adapter(self, student_width: int, teacher_width: int) -> nn.Module | None:
        """Returns what learns beside the student for this term and is left behind afterwards; most need nothing."""
        return None

    @abstractmethod
    def compare(self, student: Signals, teacher: Signals, scopes: Scopes, adapter: nn.Module | None) -> Tensor:
        """Compares two passes over one batch.

        Args:
            student: With gradients.
            teacher: Without.
            scopes: Tokens of the batch by scope.
            adapter: What `adapter` returned.

        Returns:
            A scalar in fp32, not weighted.
        """


def check_choice(term: object, option: str, got: str, allowed: Sequence[str]) -> None:
    """Refuses a value that an option of a term does not have.

    Raises:
        UserError: If it is so.
    """
    if got not in allowed:
        raise UserError(f"Expected `{option}` of {type(term).__name__} in {list(allowed)}, got {got!r}. Correct it.")


class LogitTerm(DistillTerm):
    """Predictions of the next token: LLaVA-KD's MDist, LLAVADI's `align_logits`, `reverse_kd`, `jsd`, `mse_distill`.

    Args:
        weight: LLAVADI's diary found 5 better than 1.
        scope: `answer` and so on; `all` works with `standardise` only, says the diary.
        divergence: `forward`, `reverse`, `jsd` or `mse`.
        temperature: Logits are divided by it, and the result multiplied by its square; below 0.7 it did harm.
        standardise: Whether mean and standard deviation of each position's logits are taken out first.
        mean: See `mean_over`.
    """

    needs_logits = True

    def __init__(
        self,
        weight: float = 1.0,
        scope: str = "answer",
        divergence: str = "forward",
        temperature: float = 1.0,
        standardise: bool = False,
        mean: str = "tokens",
    ) -> None:
        super().__init__(weight, scope, mean)
        check_choice(self, "divergence", divergence, list(DIVERGENCES))
        if not temperature > 0:
            raise UserError(f"Expected `temperature` of LogitTerm > 0, got {temperature}. Correct it.")
        self.divergence, self.temperature, self.standardise = divergence, temperature, standardise
        self.name = f"logits_{divergence}_{scope}"

    def compare(self, student: Signals, teacher: Signals, scopes: Scopes, adapter: nn.Module | None) -> Tensor:
        """Compares the logits of the scope."""
        scope = scopes[self.scope]
        divergence = terms.tempered(DIVERGENCES[self.divergence], self.temperature, self.standardise)
        pair = (heard(each.logits).index_select(0, scope.rows) for each in (student, teacher))
        return mean_over(scope, divergence(*pair), self.mean)


class HiddenTerm(DistillTerm):
    """Last hidden states: the student's, mapped to the teacher's width by a small MLP that learns (LLAVADI).

    Args:
        weight: As above.
        scope: As above; the diary's best leaves it open, `answer` alone did harm there.
        project: False compares the states as they are, for models of one width.
        mean: See `mean_over`.
    """

    def __init__(self, weight: float = 1.0, scope: str = "answer", project: bool = True, mean: str = "tokens") -> None:
        super().__init__(weight, scope, mean)
        self.project = project
        self.name = f"hidden_{scope}"

    def adapter(self, student_width: int, teacher_width: int) -> nn.Module | None:
        """Returns Linear, GELU, Linear.

        Raises:
            UserError: If it is not wanted, and the widths differ.
        """
        if self.project:
            return dense_layers(student_width, teacher_width, 2)
        if student_width != teacher_width:
            raise UserError(
                f"`project: false` of HiddenTerm compares hidden states of one width, got {student_width} of the "
                f"student and {teacher_width} of the teacher. Set `project: true`."
            )
        return None

    def compare(self, student: Signals, teacher: Signals, scopes: Scopes, adapter: nn.Module | None) -> Tensor:
        """Compares the hidden states of the scope."""
        scope = scopes[self.scope]
        own, aim = (heard(each.hidden).index_select(0, scope.places) for each in (student, teacher))
        if adapter is not None:
            own = adapter(own.to(next(adapter.parameters()).dtype))
        return mean_over(scope, terms.squared_error(own, aim), self.mean)


class RouterTerm(DistillTerm):
    """What routers choose, layer by layer, among the experts that both models have (of this project).

    Args:
        weight: As above.
        scope: As above.
        mean: See `mean_over`.
    """

    needs_routers = True

    def __init__(self, weight: float = 1.0, scope: str = "all", mean: str = "tokens") -> None:
        super().__init__(weight, scope, mean)
        self.name = f"routers_{scope}"

    def compare(self, student: Signals, teacher: Signals, scopes: Scopes, adapter: nn.Module | None) -> Tensor:
        """Compares the choices of the scope's tokens; the mean over layers."""
        scope = scopes[self.scope]
        found = [
            mean_over(
                scope,
                terms.router_kl(own.logits.index_select(0, scope.places), aim.logits.index_select(0, scope.places)),
                self.mean,
            )
            for own, aim in zip(student.routers, teacher.routers, strict=True)
        ]
        return torch.stack(found).mean()
