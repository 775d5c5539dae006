"""Rules that choose the layers to extend and the experts to copy, from usage before and after a probe.

A rule is a small class named in YAML by `class_path`; it maps usage to a score for each layer and to
the chosen layers. Shapes: E experts of a layer, L layers.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from moextend_pl.contracts import UserError
from moextend_pl.moe.usage import usage_shares

Usage = Mapping[int, Tensor]


def shift_score(before_E: Tensor, after_E: Tensor) -> float:
    """Measures how much the choice of experts shifted in one layer.

    The standard deviation (ddof 1) over experts of the change of usage shares (MoExtend, Eq. 6).

    Args:
        before_E: Selections of each expert before the probe.
        after_E: Selections of each expert after it.

    Returns:
        The score; 0 if usage did not change.

    Example:
        >>> import torch
        >>> round(shift_score(torch.tensor([1, 1]), torch.tensor([3, 1])), 4)
        0.3536
    """
    return float((usage_shares(before_E) - usage_shares(after_E)).std(correction=1))


def divergence_score(before_E: Tensor, after_E: Tensor) -> float:
    """Measures the shift as the Kullback-Leibler divergence of usage after from usage before, in nats.

    Args:
        before_E: Selections of each expert before the probe.
        after_E: Selections of each expert after it.

    Returns:
        The divergence, with one selection added to every count so that it stays finite.
    """
    before, after = usage_shares(before_E + 1), usage_shares(after_E + 1)
    return float((after * (after / before).log()).sum())


def source_experts(usage_E: Tensor, count: int = 1) -> tuple[int, ...]:
    """Returns the most used experts of a layer, most used first; a tie goes to the lower index.

    Args:
        usage_E: Selections of each expert.
        count: How many to return.

    Raises:
        UserError: If the layer has fewer experts.
    """
    if count > len(usage_E):
        raise UserError(f"Expected at most {len(usage_E)} new experts in a layer of as many experts, got {count}.")
    return tuple(usage_E.argsort(descending=True, stable=True)[:count].tolist())


def random_experts(experts: int, count: int, seed: int, layer: int) -> tuple[int, ...]:
    """Returns experts drawn at random, each layer apart, to compare the most used ones with.

    Args:
        experts: E.
        count: How many to return.
        seed: Seed of the draw.
        layer: 0-based index of the layer.

    Raises:
        UserError: If the layer has fewer experts.
    """
    if count > experts:
        raise UserError(f"Expected at most {experts} new experts in a layer of as many experts, got {count}.")
    return tuple(random.Random(f"{seed} {layer}").sample(range(experts), count))


def strongest(scores: Mapping[int, float], fraction: float) -> list[int]:
    """Returns the floor(fraction * L) layers of highest score, sorted; a tie goes to the lower layer."""
    # Rounding may leave a product just below its integer: 15 / 22 * 22 is 14.999999999999998.
    count = math.floor(fraction * len(scores) + 1e-9)
    if count == 0:
        raise UserError(
            f"Expected `fraction` to choose at least one of {len(scores)} layers, got {fraction}. "
            f"Set it to {1 / len(scores):.3g} or more."
        )
    return sorted(sorted(scores, key=lambda layer: (-scores[layer], layer))[:count])


class LayerRule(ABC):
    """Chooses layers from usage; subclasses say how."""

    def scores(self, before: Usage, after: Usage) -> dict[int, float]:
        """Returns the shift score of every layer, shown in the report whatever the rule chooses by."""
        return {layer: shift_score(before[layer], after[layer]) for layer in before}

    @abstractmethod
    def choose(self, before: Usage, after: Usage) -> list[int]:
        """Returns the chosen layers, sorted.

        Args:
            before: Selections (E,) by layer before the probe.
            after: The same after it.
        """


class _Fractional(LayerRule):
    """Chooses a share of the layers.

    Args:
        fraction: p, share of the mixture-of-experts layers, rounded down.
    """

    def __init__(self, fraction: float = 0.5) -> None:
        if not 0 < fraction <= 1:
            raise UserError(f"Expected `fraction` in (0, 1], got {fraction}. Set `rule.init_args.fraction`.")
        self.fraction = fraction


class ShiftRule(_Fractional):
    """The paper's rule: the layers whose usage shifted most (MoExtend, Eq. 6, fraction p = 0.5)."""

    def choose(self, before: Usage, after: Usage) -> list[int]:
        """Returns the layers of largest shift."""
        return strongest(self.scores(before, after), self.fraction)


class LeastShiftRule(_Fractional):
    """The layers whose usage shifted least: the contrary of the paper's rule, to try it by."""

    def choose(self, before: Usage, after: Usage) -> list[int]:
        """Returns the layers of smallest shift."""
        return strongest({layer: -score for layer, score in self.scores(before, after).items()}, self.fraction)


class DivergenceRule(_Fractional):
    """The layers whose usage diverged most, by Kullback-Leibler divergence."""

    def scores(self, before: Usage, after: Usage) -> dict[int, float]:
        """Returns the divergence of every layer, in nats."""
        return {layer: divergence_score(before[layer], after[layer]) for layer in before}

    def choose(self, before: Usage, after: Usage) -> list[int]:
        """Returns the layers of largest divergence."""
        return strongest(self.scores(before, after), self.fraction)


class RandomRule(_Fractional):
    """Layers drawn at random, to compare the other rules with.

    Args:
        fraction: Share of the layers.
        seed: Seed of the draw.
    """

    def __init__(self, fraction: float = 0.5, seed: int = 0) -> None:
        super().__init__(fraction)
        self.seed = seed

    def choose(self, before: Usage, after: Usage) -> list[int]:
        """Returns floor(fraction * L) layers, the same for the same seed."""
        layers = sorted(before)
        draws = random.Random(self.seed).sample(range(len(layers)), len(layers))
        return strongest({layer: float(draw) for layer, draw in zip(layers, draws, strict=True)}, self.fraction)


class AllLayers(LayerRule):
    """Every mixture-of-experts layer."""

    def choose(self, before: Usage, after: Usage) -> list[int]:
        """Returns all layers."""
        return sorted(before)


class FirstLayers(_Fractional):
    """The first layers, half of them unless told otherwise."""

    def choose(self, before: Usage, after: Usage) -> list[int]:
        """Returns the floor(fraction * L) lowest layers."""
        return strongest({layer: -float(layer) for layer in before}, self.fraction)


class LastLayers(_Fractional):
    """The last layers, half of them unless told otherwise."""

    def choose(self, before: Usage, after: Usage) -> list[int]:
        """Returns the floor(fraction * L) highest layers."""
        return strongest({layer: float(layer) for layer in before}, self.fraction)


class IntervalLayers(LayerRule):
    """Every n-th mixture-of-experts layer, starting with the first.

    Args:
        step: n.
    """

    def __init__(self, step: int = 2) -> None:
        if step < 1:
            raise UserError(f"Expected `step` >= 1, got {step}. Set `rule.init_args.step`.")
        self.step = step

    def choose(self, before: Usage, after: Usage) -> list[int]:
        """Returns each `step`-th layer."""
        return sorted(before)[:: self.step]


class ExplicitLayers(LayerRule):
    """The layers named by the user.

    Args:
        layers: 0-based indices of decoder layers, dense ones counted.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = sorted(set(layers))

    def choose(self, before: Usage, after: Usage) -> list[int]:
        """Returns the named layers.

        Raises:
            UserError: If one of them has no experts.
        """
        unknown = [layer for layer in self.layers if layer not in before]
        if unknown or not self.layers:
            raise UserError(f"Expected layers among {sorted(before)}, got {self.layers}. Set `rule.init_args.layers`.")
        return self.layers


class BudgetRule(LayerRule):
    """As many layers of largest shift as a budget of new parameters allows.

    Args:
        parameters: Most new parameters in all.
        parameters_per_layer: New parameters of one extended layer.
    """

    def __init__(self, parameters: int, parameters_per_layer: int) -> None:
        if not 0 < parameters_per_layer <= parameters:
            raise UserError(
                f"Expected a budget of at least one layer's {parameters_per_layer} new parameters, got {parameters}."
            )
        self.count = parameters // parameters_per_layer

    def choose(self, before: Usage, after: Usage) -> list[int]:
        """Returns the layers of largest shift that fit into the budget."""
        count = min(self.count, len(before))
        return strongest(self.scores(before, after), count / len(before))
