"""The arithmetic of memory of one stage; plain numbers in, plain numbers out.

What is assumed: experts run as `moextend` or as transformers' `grouped_mm`, attention as a fused kernel that keeps
queries, keys, values and its output; tokens spread evenly over the experts of a layer; every sequence has the full
padded length, one image, and learns all of its text. Nothing is kept below the first tensor that learns, and
frozen matrices keep no inputs. The formulas count what torch saves for the backward pass, operation by operation,
and are compared with real runs in `tests/unit/moextend_pl/plan/`. Symbols as in `plan.facts`; S padded length, T
tokens of one rank's batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from moextend_pl.plan.facts import Layer, Matrix, ModelShape, Norm, Part, Stack

FP32, INT32, INT64 = 4, 4, 8
# Half a byte and a 32-bit scale for each 64 values, as bitsandbytes stores them without double quantisation.
NF4_BYTES = 0.5 + FP32 / 64
NO_GRAPH, EXPERTS_ONLY, WHOLE = range(3)


@dataclass(frozen=True)
class RunShape:
    """What a run does in one step.

    Attributes:
        gpus: Ranks.
        micro_batch: Sequences of one rank in one forward pass.
        accumulate: Forward passes of one optimizer step.
        steps: Optimizer steps.
        length: S, tokens of a padded sequence.
        mean_length: Tokens of a sequence that time is spent on, padding included.
        images: Images of a sequence.
        encoded_together: Images that a frozen tower encodes at a time, empty places included.
        compute_bytes: Bytes of one value outside the experts.
        cast_copies: Whether autocast keeps a 16-bit copy of each frozen matrix for the backward pass.
        nf4: Whether frozen matrices of the decoder are stored in 4 bits.
        new_share: Share of selections of an extended layer that go to new experts; None for an even spread.
        learned: Learned tokens of a sequence; None for all of its text.
        on_cpu: Whether old experts leave out the selections of new ones, for which a GPU would have to wait.
        recompute: Whether decoder layers keep their input only and are computed again in the backward pass.
        recompute_images: Whether blocks of a tower, and a projector, that learn do so too.
        compiled: Whether decoder layers are compiled, so that norms keep what they read as it is, not in fp32.
        shared_by: Ranks that share one copy of the weights; 1 where each holds everything (DDP).
        shares_experts: Whether they share the base's experts, to which tokens travel, and not every layer (FSDP2).
    """

    gpus: int
    micro_batch: int
    accumulate: int
    steps: int
    length: int
    mean_length: float
    images: float = 1.0
    encoded_together: int = 1
    compute_bytes: int = 2
    cast_copies: bool = False
    nf4: bool = False
    new_share: float | None = None
    learned: float | None = None
    on_cpu: bool = False
    recompute: bool = False
    recompute_images: bool = False
    compiled: bool = False
    shared_by: int = 1
    shares_experts: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU.

    Attributes:
        weights: All parameters and buffers.
        gradients: Of what learns.
        optimizer: Both moments of AdamW and its counters.
        buckets: Second copy of the gradients that DDP sends; 0 on one GPU.
        activations: What is kept for the backward pass.
        temporaries: The largest that comes and goes: scores of the head with their gradients, gradients inside the
            kernels of one layer's experts, or, in 4 bits, the experts of one layer unpacked.
        gathered: Layers that FSDP2 gathers from other ranks, of which one computes and one is on its way.
    """

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    activations: float
    temporaries: float
    gathered: float = 0.0

    @property
    def kept(self) -> float:
        """What stays between steps."""
        return self.weights + self.gradients + self.optimizer + self.buckets

    @property
    def total(self) -> float:
        """All of it."""
        return self.kept + self.activations + self.temporaries + self.gathered


def graph_states(shape: ModelShape) -> list[int]:
    """Returns for each decoder layer whether it keeps anything for the backward pass.

    `WHOLE` where gradients flow through all of the layer, `EXPERTS_ONLY` in the first layer in which something
    learns, if only router or experts do, `NO_GRAPH` below it.
    """
    projector = shape.projector is not None and shape.projector.learns
    reached = shape.embeddings_learn or projector or (shape.tower is not None and shape.tower.learns)
    states = []
    for layer in shape.layers:
        attention_learns = any(m.learns for m in layer.mixer) or any(norm.learns for norm in layer.norms)
        if reached or attention_learns:
            states.append(WHOLE)
        else:
            experts_learn = any(m.learns for m in layer.mlp) or any(stack.learns for stack in layer.stacks)
            starts = layer.router_learns or experts_learn
            states.append(EXPERTS_ONLY if starts else NO_GRAPH)
        reached = reached or states[-1] != NO_GRAPH
    return states


def new_selections(layer: Layer, run: RunShape) -> float:
    """Returns how many of a token's K selections go to new experts."""
    if run.new_share is not None and any(stack.new for stack in layer.stacks):
        return layer.top_k * run.new_share
    return layer.top_k * sum(s.experts for s in layer.stacks if s.new) / max(layer.routed, 1)


def computed_rows(stack: Stack, layer: Layer, run: RunShape) -> float:
    """Returns the rows for one token that a stack of experts multiplies."""
    new = new_selections(layer, run)
    return new * stack.experts / sum(s.experts for s in layer.stacks if s.new) if stack.new else layer.top_k - new


def saved_inputs(matrices: Iterable[Matrix]) -> int:
    """Returns the values of a token that are kept because matrices that learn read them, each tensor once."""
    return sum({m.reads: m.inputs for m in matrices if m.learns}.values())


def saved_by_norms(norms: Iterable[Norm], run: RunShape) -> float:
    """Returns bytes of a token: the input in fp32, one factor, and the normalised value where the weight learns."""
    size = run.compute_bytes
    if run.compiled:  # the input is kept as it was read, and the rest is computed again
        return sum(size * norm.width + FP32 for norm in norms)
    return sum(FP32 * norm.width + FP32 + size * norm.width * norm.learns for norm in norms)


def by_kernels(layer: Layer, run: RunShape) -> bool:
    """Returns whether kernels compute a layer's experts in a run: on a GPU, and not in 4 bits."""
    return layer.kernels and not run.on_cpu and not run.nf4


def saved_by_kernels(layer: Layer) -> float:
    """Returns bytes of a token that the kernels of a layer's experts keep.

    For each of its K slots gate and value (2 I), its place, its token and its weight; and the token itself (D) where
    new experts learn, unless a router that learns keeps that already.
    """
    stack = layer.stacks[0]
    learns = any(each.learns for each in layer.stacks) and not any(m.learns and m.reads == "mlp" for m in layer.mlp)
    return layer.top_k * (2 * stack.inner * stack.bytes + 2 * INT32 + FP32) + learns * stack.width * stack.bytes


def inside_kernels(layer: Layer) -> float:
    """Returns bytes of a token that come and go in the backward pass of the kernels.

    For each slot the gradients of activation and projection (3 I), then those of projection and token (2 I + D), and
    beside them the activations of new experts that learn.
    """
    stack = layer.stacks[0]
    learned = min(layer.top_k, sum(each.experts for each in layer.stacks if each.learns))
    return (layer.top_k * (2 * stack.inner + max(stack.inner, stack.width)) + learned * stack.inner) * stack.bytes


def saved_by_stack(stack: Stack, layer: Layer, run: RunShape, state: int) -> float:
    """Returns bytes of a token that a stack of experts keeps.

    New experts hold a row for each selection of them, old ones for all K, also for those that went to new experts.
    A row is the gate and the value (2 I), the activated gate (I), the output (D), three indices and a weight; where
    the weights learn, also the input (D) and the product (I). Lean experts keep the gate and the value and one index
    for each row, and an index and a weight for each selection.
    """
    if stack.lean and state == WHOLE:
        rows = computed_rows(stack, layer, run) if stack.new or run.on_cpu else layer.top_k
        return rows * (2 * stack.inner * stack.bytes + INT64) + layer.top_k * (INT64 + FP32)
    rows = computed_rows(stack, layer, run) if stack.new else layer.top_k
    learns = stack.learns
    inner = 3 * stack.inner if state == WHOLE or learns else 0
    output = stack.width if state == WHOLE or learns or layer.router_learns else 0
    return rows * ((inner + output + learns * (stack.width + stack.inner)) * stack.bytes + 3 * INT64 + FP32)


def saved_by_layer(layer: Layer, run: RunShape, state: int) -> float:
    """Returns bytes that a layer keeps for one token, attention masks included."""
    size = run.compute_bytes
    if state == NO_GRAPH:
        return 0.0
    together, apart = saved_by_kernels, lambda layer: sum(saved_by_stack(s, layer, run, state) for s in layer.stacks)
    kept = (together if by_kernels(layer, run) else apart)(layer) + saved_inputs(layer.mlp) * size
    if layer.stacks:
        # Probabilities for the choice and for the balance loss, the choice, its weights and their sum.
        kept += 2 * FP32 * layer.routed + (INT64 + FP32) * layer.top_k + FP32
    extensions = sum(stack.new for stack in layer.stacks)
    if extensions == 1 and by_kernels(layer, run):  # a kernel selects, and keeps logits and choice
        kept += size * layer.routed + INT64 * layer.top_k + 1
    elif extensions:
        # The same once more for all experts together, and the calibration before and after its GELU.
        kept += 2 * FP32 * layer.routed + 2 * FP32 * layer.correction + (INT64 + FP32) * layer.top_k + 3 * FP32
    if state == EXPERTS_ONLY:
        return kept
    kept += saved_by_norms(layer.norms, run) + saved_inputs(layer.mixer) * size + layer.inner * size
    # Queries, keys, values and output (keys and values stand for all heads), log-sums, one row of the mask.
    return kept + 2 * (layer.scores + layer.values) * size + FP32 * layer.heads + size * run.length


def learned_tokens(shape: ModelShape, run: RunShape) -> float:
    """Returns the tokens of a sequence whose logits are computed; all of the text, or all, if not stated."""
    pictures = shape.placeholders(run.images) * (not shape.asks_pictures)
    return run.learned if run.learned is not None else max(run.length - pictures, 0.0)


def activation_bytes(shape: ModelShape, run: RunShape) -> float:
    """Returns what one rank keeps for the backward pass of a micro-batch."""
    states = graph_states(shape)
    layers = [saved_by_layer(layer, run, state) for layer, state in zip(shape.layers, states, strict=True)]
    token = sum(layers)
    if run.recompute:
        size = FP32 if run.cast_copies else run.compute_bytes  # under autocast values between layers stay in fp32
        token = size * float(sum(layer.width for layer, state in zip(shape.layers, states, strict=True) if state))
    if shape.final_norm is not None:
        token += saved_by_norms([shape.final_norm], replace(run, compiled=False))
    sequence = (token + shape.embeddings_learn * INT64) * run.length
    if shape.head is not None:
        vocabulary = shape.head.weights // max(shape.head.inputs, 1)
        head = FP32 * vocabulary + shape.head.learns * shape.head.inputs * run.compute_bytes + INT64
        sequence += head * learned_tokens(shape, run)
    images = [network for network in (shape.tower, shape.projector) if network is not None]
    twice = [network for network in images if network.learns and run.recompute_images]
    # One layer or block at a time is there as a whole; that of a tower when all of the language model is gone.
    sequence += run.recompute * max(layers, default=0.0) * run.length
    sequence = max([sequence, *(run.images * network.block for network in twice)])
    sequence += run.images * sum(network.again if network in twice else network.saved for network in images)
    copies = run.compute_bytes * _copied_weights(shape, states, run.recompute) if run.cast_copies else 0
    copies += sum(network.fixed_again if network in twice else network.fixed for network in images)
    return sequence * run.micro_batch + copies + _joined_stacks(shape, run, states)


def _joined_stacks(shape: ModelShape, run: RunShape, states: list[int]) -> int:
    """Returns bytes of the new experts of several extensions, which kernels read as one stack."""
    layers = [layer for layer, state in zip(shape.layers, states, strict=True) if state and by_kernels(layer, run)]
    stacks = [[stack for stack in layer.stacks if stack.new] for layer in layers]
    return sum(s.experts * s.weights * s.bytes for new in stacks if len(new) > 1 for s in new)


def _copied_weights(shape: ModelShape, states: list[int], recompute: bool) -> int:
    """Returns how many weights autocast keeps a copy of; frozen ones of one layer at a time if that is recomputed."""
    whole = [layer for layer, state in zip(shape.layers, states, strict=True) if state == WHOLE]
    learning = sum(m.weights for layer in whole for m in layer.mixer if m.learns)
    frozen = [sum(m.weights for m in layer.mixer if not m.learns) for layer in whole]
    return learning + (max(frozen, default=0) if recompute else sum(frozen))


def memory(shape: ModelShape, run: RunShape) -> Memory:
    """Returns the bytes of one rank that holds everything."""
    weights = float(sum(part.bytes for part in shape.parts) + shape.buffer_bytes)
    if run.nf4:
        weights += sum(part.quantisable * (NF4_BYTES - part.bytes / part.parameters) for part in shape.parts)
    gradients = sum(part.learning_bytes for part in shape.parts)
    vocabulary = shape.head.weights / max(shape.head.inputs, 1) if shape.head is not None else 0
    unpacked = max((s.experts * s.weights for layer in shape.layers for s in layer.stacks), default=0)
    scores = learned_tokens(shape, run) * run.micro_batch * vocabulary
    layers = [layer for layer, state in zip(shape.layers, graph_states(shape), strict=True) if state]
    kernels = [inside_kernels(layer) for layer in layers if by_kernels(layer, run)]
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=sum(optimizer_bytes(part) for part in shape.parts),
        buckets=gradients if run.gpus > 1 else 0,
        activations=activation_bytes(shape, run),
        temporaries=max(
            scores * (2 * run.compute_bytes + FP32),
            run.nf4 * unpacked * run.compute_bytes,
            max(kernels, default=0.0) * run.length * run.micro_batch,
        ),
    )


def optimizer_bytes(part: Part) -> float:
    """Returns both moments in fp32, a master copy where the parameters are in half precision, and the counters."""
    copies = 2 if part.learning_bytes == FP32 * part.learning else 3
    return FP32 * (copies * part.learning + part.learning_tensors)


def checkpoint_bytes(shape: ModelShape) -> float:
    """Returns the size of a checkpoint: what learns and both moments of it."""
    return sum(part.learning_bytes + optimizer_bytes(part) for part in shape.parts)
