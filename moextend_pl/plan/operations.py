"""The arithmetic of operations of one stage, under the assumptions of `plan.cost`.

A multiplication and an addition are two. Symbols as in `plan.facts`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moextend_pl.plan.cost import EXPERTS_ONLY, NO_GRAPH, WHOLE, RunShape, computed_rows, graph_states, learned_tokens
from moextend_pl.plan.facts import Layer, ModelShape

# A fused backward pass of attention computes the scores once more: five products for the two of the forward pass.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Operations:
    """Operations of one micro-batch of one rank; a multiplication and an addition are two.

    Attributes:
        forward: Of the forward pass.
        again: Of layers that are computed again in the backward pass.
        inputs: Of the backward pass towards inputs (dX).
        weights: Of the backward pass towards weights that learn (dW).
        tower: Of the vision tower, both passes.
        teacher: Of the forward pass of a frozen teacher, its tower included.
    """

    forward: float
    again: float
    inputs: float
    weights: float
    tower: float
    teacher: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.again + self.inputs + self.weights + self.tower + self.teacher


def layer_operations(layer: Layer, run: RunShape, state: int) -> tuple[float, float, float]:
    """Returns forward, dX and dW operations of a layer for a token; attention counts as if it were not causal."""
    attention = 2 * run.mean_length * (layer.scores + layer.values)
    forward = attention + 2 * sum(m.weights for m in (*layer.mixer, *layer.mlp))
    inputs = ATTENTION_BACKWARD * attention + 2 * sum(m.weights for m in (*layer.mixer, *layer.mlp))
    weights = 2.0 * sum(m.weights for m in (*layer.mixer, *layer.mlp) if m.learns)
    partial = 0.0
    for stack in layer.stacks:
        rows = computed_rows(stack, layer, run)
        forward += 2 * rows * stack.weights
        inputs += 2 * rows * stack.weights
        weights += 2 * rows * stack.weights * stack.learns
        # Where the input needs no gradient, experts that learn still hand it through their last matrix.
        partial += 2 * rows * stack.width * stack.inner * stack.learns
    return forward, {NO_GRAPH: 0.0, EXPERTS_ONLY: partial, WHOLE: inputs}[state], weights


def recomputed_operations(shape: ModelShape, run: RunShape, states: list[int]) -> float:
    """Returns for a token what layers that keep their input only do once more.

    torch stops at the last value that it needs: the last product of a layer without experts is not done again.
    """
    kept = [layer for layer, state in zip(shape.layers, states, strict=True) if state != NO_GRAPH]
    whole = sum(layer_operations(layer, run, WHOLE)[0] for layer in kept)
    return whole - 2 * sum(layer.mixer[-1].weights for layer in kept if not layer.stacks)


def operations(shape: ModelShape, run: RunShape) -> Operations:
    """Returns the operations of one micro-batch of one rank, of its mean length."""
    states = graph_states(shape)
    layers = [layer_operations(layer, run, state) for layer, state in zip(shape.layers, states, strict=True)]
    forward, inputs, weights = (sum(values) * run.mean_length for values in zip(*layers)) if layers else (0.0, 0.0, 0.0)
    again = run.recompute * recomputed_operations(shape, run, states) * run.mean_length
    if shape.head is not None:
        head = 2 * shape.head.weights * learned_tokens(shape, run) * run.mean_length / run.length
        forward, inputs, weights = forward + head, inputs + head, weights + head * shape.head.learns
    forward, again, inputs, weights = (value * run.micro_batch for value in (forward, again, inputs, weights))
    images = run.images * run.micro_batch
    # A few more than are done again: torch stops at the last value that it needs.
    networks = [network for network in (shape.tower, shape.projector) if network is not None and network.learns]
    again += run.recompute_images * images * sum(network.repeated for network in networks)
    tower = 0.0
    if shape.tower is not None:
        together = 1 if shape.tower.learns else run.encoded_together
        tower = (math.ceil(images / together) * together) * (shape.tower.forward + shape.tower.backward)
    if shape.projector is not None:
        forward += images * shape.projector.forward
        weights += images * shape.projector.backward
    return Operations(forward, again, inputs, weights, tower, teacher_operations(shape, run))


def teacher_operations(shape: ModelShape, run: RunShape) -> float:
    """Returns the operations of a frozen teacher, which is shown the whole micro-batch; its head, where terms ask."""
    if shape.teacher is None:
        return 0.0
    alone = operations(shape.teacher, replace(run, learned=learned_tokens(shape, run)))
    return alone.forward + alone.tower
