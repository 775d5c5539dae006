"""What the costs of a model depend on, as plain numbers.

Symbols: E experts of the base, N new experts, D width of the model, I width inside an expert, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    forward: int
    backward: int
    saved: int
    learns: bool


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
        unit_bytes: The largest unit that FSDP2 gathers, a decoder layer or norm and head.
        unit_learning_bytes: What learns in the unit of which most learns.
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
    unit_bytes: int = 0
    unit_learning_bytes: int = 0
