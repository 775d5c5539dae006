"""What the costs of a model depend on, as plain numbers, and the memory and speed of common GPUs.

Symbols: E experts of the base, N new experts, D width of the model, I width inside an expert, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from moextend_pl.contracts import UserError


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the model.

    Attributes:
        name: Name of the part, as in the training plan.
        parameters: Their number.
        learning: How many of them learn.
        bytes: What they take in memory.
        learning_bytes: What those that learn take.
        learning_tensors: Number of tensors that learn.
        dtype: Their type, or types.
        quantisable: How many of them `quantize: nf4` can store in 4 bits: frozen matrices inside the decoder layers.
        cut: Bytes of those that FSDP2 shares among ranks.
        cut_learning: Bytes of those that it shares and that learn.
        experts: Bytes of the base's experts, which expert parallelism shares among ranks.
    """

    name: str
    parameters: int
    learning: int
    bytes: int
    learning_bytes: int
    learning_tensors: int
    dtype: str
    quantisable: int
    cut: int = 0
    cut_learning: int = 0
    experts: int = 0


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that every token meets once.

    Attributes:
        weights: Number of weights.
        inputs: Width of what it reads; 0 where that is saved for the backward pass anyway.
        reads: Name of what it reads, equal for matrices that read the same tensor.
        learns: Whether it learns.
    """

    weights: int
    inputs: int
    reads: str
    learns: bool


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm, computed in fp32.

    Attributes:
        width: Values of a token that it normalises.
        learns: Whether its weight learns.
    """

    width: int
    learns: bool


@dataclass(frozen=True)
class Stack:
    """Experts whose weights lie in one stack.

    Attributes:
        experts: Their number.
        weights: Weights of one expert.
        width: D.
        inner: I.
        bytes: Of one value that they compute.
        new: Whether the extension added them.
        learns: Whether they learn.
        lean: Whether their backward pass is that of `moextend_pl.moe.dispatch`.
    """

    experts: int
    weights: int
    width: int
    inner: int
    bytes: int
    new: bool
    learns: bool
    lean: bool


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        width: D.
        mixer: Matrices before the experts: those of attention, or all of a layer without experts.
        mlp: Matrices beside the experts: router and shared experts.
        inner: Values of a token between the matrices of dense and shared MLPs.
        norms: All norms of the layer.
        scores: Width of queries over all heads.
        values: Width of values over all heads.
        heads: Attention heads.
        stacks: Stacks of experts.
        top_k: Experts per token.
        routed: Experts that the router chooses from.
        correction: Hidden units of the calibrations.
        router_learns: Whether rows of the router or a calibration learn.
        kernels: Whether `moextend_pl.moe.kernels` computes its experts on a GPU, all stacks in one pass.
    """

    width: int
    mixer: tuple[Matrix, ...]
    mlp: tuple[Matrix, ...]
    inner: int
    norms: tuple[Norm, ...]
    scores: int
    values: int
    heads: int
    stacks: tuple[Stack, ...] = ()
    top_k: int = 0
    routed: int = 0
    correction: int = 0
    router_learns: bool = False
    kernels: bool = False


@dataclass(frozen=True)
class Network:
    """A tower or a projector, measured on one image.

    Attributes:
        forward: Operations of the forward pass.
        backward: Operations of the backward pass; 0 where nothing is propagated.
        saved: Bytes kept for the backward pass.
        learns: Whether any of it learns.
        fixed: Bytes kept whatever the number of images: what autocast made of weights.
        again: Bytes kept where blocks keep their input only.
        fixed_again: Then of `fixed`, beside what is made of the weights of one block.
        block: Bytes of the largest block, which is there as a whole when it is computed again.
        repeated: Operations of all blocks in the forward pass.
    """

    forward: int
    backward: int
    saved: int
    learns: bool
    fixed: int = 0
    again: int = 0
    fixed_again: int = 0
    block: int = 0
    repeated: int = 0


@dataclass(frozen=True)
class ModelShape:
    """All of a model that its costs depend on.

    Attributes:
        parts: Parameters by part.
        buffer_bytes: Tensors that are no parameters.
        layers: Decoder layers in their order.
        final_norm: The norm before the head, if there is a language model.
        head: The head.
        embeddings_learn: Whether word embeddings learn.
        tower: The vision tower.
        projector: The projector.
        tokens_per_image: Placeholders of one image.
        delta_bytes: Weights that a finished run writes.
        tiles: Most images that one picture becomes, see `samples.tiling`.
        looked_at: How many of these have no placeholders: words look at them.
        unit_bytes: The largest unit that FSDP2 gathers, a decoder layer or norm and head.
        unit_learning_bytes: What learns in the unit of which most learns.
        asks_pictures: Whether logits are computed at picture tokens, too.
        teacher: The frozen model that it learns from, whose memory is a part of its own.
    """

    parts: tuple[Part, ...]
    buffer_bytes: int
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    head: Matrix | None
    embeddings_learn: bool
    tower: Network | None
    projector: Network | None
    tokens_per_image: int
    delta_bytes: int
    tiles: int = 1
    looked_at: int = 0
    unit_bytes: int = 0
    unit_learning_bytes: int = 0
    asks_pictures: bool = False
    teacher: ModelShape | None = None

    def placeholders(self, images: float) -> float:
        """Returns how many places among the words so many images have, those of pictures of the most tiles."""
        return images * self.tokens_per_image * (self.tiles - self.looked_at) / self.tiles


GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One card.

    Attributes:
        name: As on the command line.
        memory: Bytes that a program can use.
        flops: Dense 16-bit matrix operations a second, as its maker states them, without sparsity.
    """

    name: str
    memory: float
    flops: float


# Memory as drivers report it to a program, in whole GiB rounded down; speed in 10^12 a second from the data sheets.
_TABLE = {
    "b200": (178, 2250),
    "h200": (139, 989),
    "h100": (79, 989),
    "h800": (79, 989),
    "a100-80g": (79, 312),
    "a800-80g": (79, 312),
    "a100-40g": (39, 312),
    "l40s": (44, 362),
    "rtx5090": (31, 209),
    "rtx4090": (23, 165),
    "rtx3090": (23, 71),
}
GPUS = {name: Gpu(name, memory * GIB, speed * 1e12) for name, (memory, speed) in _TABLE.items()}


def choose_gpu(name: str | None, tflops: float | None = None, memory: float | None = None) -> Gpu | None:
    """Returns a card by name, or one described by hand, or None if nothing was said.

    Args:
        name: One of `GPUS`.
        tflops: Speed to assume instead, in 10^12 operations a second.
        memory: Memory to assume instead, in 10^9 bytes.

    Raises:
        UserError: If the name is not known and the description is not complete.
    """
    if name is None and tflops is None and memory is None:
        return None
    name = (name or "GPU").lower()
    known = GPUS.get(name)
    if known is None and (tflops is None or memory is None):
        raise UserError(
            f"Expected `--gpu` among {', '.join(GPUS)}, got '{name}'. For another card give `--gpu-tflops` and "
            "`--gpu-memory`."
        )
    return Gpu(
        name=name,
        memory=memory * 1e9 if memory is not None else known.memory if known else 0.0,
        flops=tflops * 1e12 if tflops is not None else known.flops if known else 0.0,
    )
