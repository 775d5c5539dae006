"""The memory of one rank where several share a copy of the weights, and what ranks send each other in a step."""

from __future__ import annotations

from dataclasses import replace
from math import comb, floor

from moextend_pl.plan import cost
from moextend_pl.plan.cost import (
    FP32,
    INT32,
    INT64,
    NO_GRAPH,
    Memory,
    RunShape,
    computed_rows,
    graph_states,
    optimizer_bytes,
)
from moextend_pl.plan.facts import Layer, ModelShape, Part
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
    if run.shares_experts:
        states = zip(shape.layers, graph_states(shape), strict=True)
        kept = sum(_kept_of_a_journey(layer, run) for layer, state in states if state != NO_GRAPH)
        layers = 1 if run.recompute else len(shape.layers)
        tokens = run.micro_batch * run.length
        return replace(
            alone,
            weights=alone.weights - elsewhere * sum(part.experts for part in shape.parts),
            buckets=min(sum(part.learning_bytes for part in shape.parts), BUCKET_BYTES),
            activations=alone.activations + kept * tokens * layers / max(len(shape.layers), 1),
            temporaries=alone.temporaries
            + tokens * max((_on_the_way(layer, run) for layer in shape.layers), default=0),
        )
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


def ranks_met(experts: int, ranks: int, chosen: float) -> float:
    """Returns how many ranks hold at least one of the experts that a token chooses, each set of them as likely.

    Args:
        experts: E.
        ranks: That share them evenly.
        chosen: Of a token; between whole numbers a mean of both.
    """
    less = floor(chosen)
    share = chosen - less
    missed = [comb(experts - experts // ranks, k) / comb(experts, k) for k in (less, less + 1)]
    return ranks * (1 - (1 - share) * missed[0] - share * missed[1])


def _pairs(layer: Layer, run: RunShape) -> float:
    """Returns to how many ranks a token is sent, its own included."""
    old = [stack for stack in layer.stacks if not stack.new]
    return ranks_met(old[0].experts, run.shared_by, computed_rows(old[0], layer, run)) if old else 0.0


def _on_the_way(layer: Layer, run: RunShape) -> float:
    """Returns bytes of a token while it travels: its rows where it leaves and where it arrives, and what comes back."""
    return 4 * _pairs(layer, run) * layer.width * run.compute_bytes


def _kept_of_a_journey(layer: Layer, run: RunShape) -> float:
    """Returns bytes of a token that are kept for its way back, beyond those of experts in one place."""
    pairs = _pairs(layer, run)
    if not pairs:
        return 0.0
    return run.shared_by * INT64 + pairs * INT64 + (pairs - 1) * layer.top_k * (INT64 + FP32)


def received_bytes(shape: ModelShape, run: RunShape) -> float:
    """Returns what a rank receives in a step from those that it shares weights with.

    Under FSDP2 every layer for each pass through it, and gradients of what learns; layers below the first one that
    learns have no backward pass. Under expert parallelism tokens, and what experts made of them.
    """
    elsewhere, states = 1 - 1 / run.shared_by, graph_states(shape)
    if run.shares_experts:
        layers = zip(shape.layers, states, strict=True)
        token = sum(_received_of_a_token(layer, run, state != NO_GRAPH) for layer, state in layers)
        return run.accumulate * elsewhere * run.micro_batch * run.length * token
    passes = 1 + (sum(state != NO_GRAPH for state in states) / len(states) if states else 0.0)
    cut, learning = (sum(getattr(part, name) for part in shape.parts) for name in ("cut", "cut_learning"))
    return run.accumulate * elsewhere * (passes * cut + learning)


def _received_of_a_token(layer: Layer, run: RunShape, learns: bool) -> float:
    """Returns bytes of a token on all its ways: there with indices and weights, back, and the same for gradients."""
    there, weights = layer.width * run.compute_bytes, layer.top_k * FP32
    forward = 2 * there + layer.top_k * INT32 + weights
    backward = 2 * there + weights
    return _pairs(layer, run) * (forward * (1 + run.recompute * learns) + backward * learns)


def reduced_bytes(shape: ModelShape, run: RunShape) -> float:
    """Returns what a rank receives in a step for the gradients that it holds with others, summed up in a ring.

    Under DDP once a step; where weights are shared, once a batch, of what each rank holds whole, and of its part of
    what FSDP2 shares where there are several copies.
    """
    learning = float(sum(part.learning_bytes for part in shape.parts))
    if run.shared_by == 1:
        return 2 * (1 - 1 / run.gpus) * learning
    cut = 0.0 if run.shares_experts else float(sum(part.cut_learning for part in shape.parts))
    copies = run.gpus / run.shared_by
    among_copies = 2 * (1 - 1 / copies) * cut / run.shared_by
    return run.accumulate * (2 * (1 - 1 / run.gpus) * (learning - cut) + among_copies)


def sent(shape: ModelShape, run: RunShape) -> list[str]:
    """Says in one sentence what ranks that share weights send each other; nothing where each holds everything."""
    if run.shared_by == 1:
        return []
    size = received_bytes(shape, run) + reduced_bytes(shape, run)
    what = "experts of the base" if run.shares_experts else "weights"
    return [
        f"{what} are shared by {run.shared_by} GPUs: each receives {size / 1e9:,.1f} GB a step, whose time is not "
        "counted"
    ]
