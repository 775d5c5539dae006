"""The memory of one rank where several share a copy of the weights, and what they send each other for it."""

from __future__ import annotations

from dataclasses import replace

from moextend_pl.plan import cost
from moextend_pl.plan.cost import FP32, NO_GRAPH, Memory, RunShape, graph_states, optimizer_bytes
from moextend_pl.plan.facts import ModelShape, Part
from moextend_pl.training.sharding.gradients import BUCKET_BYTES


def memory(shape: ModelShape, run: RunShape) -> Memory:
    """Returns the bytes of one rank.

    What is shared is cut evenly. One layer computes while the next one is on its way, and the gradients of one layer
    are whole until they are sent.
    """
    return shared(cost.memory(shape, run), shape, run)


def shared(alone: Memory, shape: ModelShape, run: RunShape) -> Memory:
    """Returns what is left of the bytes of a rank that held everything."""
    if run.shared_by == 1:
        return alone
    elsewhere = 1 - 1 / run.shared_by
    whole = sum(part.learning_bytes - part.cut_learning for part in shape.parts)
    return replace(
        alone,
        weights=alone.weights - elsewhere * sum(part.cut for part in shape.parts),
        gradients=alone.gradients - elsewhere * sum(part.cut_learning for part in shape.parts),
        optimizer=alone.optimizer - elsewhere * sum(map(_cut_optimizer_bytes, shape.parts)),
        buckets=min(whole, BUCKET_BYTES),
        gathered=2.0 * (shape.unit_bytes + shape.unit_learning_bytes),
    )


def _cut_optimizer_bytes(part: Part) -> float:
    """Returns what of an optimizer ranks share: all but its counters of steps."""
    return (optimizer_bytes(part) - FP32 * part.learning_tensors) * part.cut_learning / max(part.learning_bytes, 1)


def received_bytes(shape: ModelShape, run: RunShape) -> float:
    """Returns what a rank receives in a step: every layer for each pass through it, and gradients of what learns.

    Layers below the first one that learns have no backward pass.
    """
    elsewhere = 1 - 1 / run.shared_by
    states = graph_states(shape)
    passes = 1 + (sum(state != NO_GRAPH for state in states) / len(states) if states else 0.0)
    cut, learning = (sum(getattr(part, name) for part in shape.parts) for name in ("cut", "cut_learning"))
    return run.accumulate * elsewhere * (passes * cut + learning)


def sent(shape: ModelShape, run: RunShape) -> list[str]:
    """Says in one sentence what ranks that share weights send each other; nothing where each holds everything."""
    if run.shared_by == 1:
        return []
    size = received_bytes(shape, run)
    return [
        f"weights are shared by {run.shared_by} GPUs: each receives {size / 1e9:,.1f} GB a step, whose time is not "
        "counted"
    ]
