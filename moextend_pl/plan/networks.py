"""Measures towers and projectors on images without values: operations, and bytes kept for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.projector import Projector
from moextend_pl.plan.facts import Network
from moextend_pl.training.activations import checkpoint_blocks, tower_blocks


def measure_tower(encoder: VisionEncoder, mixed: torch.dtype | None) -> tuple[Network, Tensor]:
    """Returns what one image costs in a tower, and its features (1, P, C).

    Args:
        encoder: Built, on any device.
        mixed: Type in which autocast computes; None without it.
    """
    side, learns = int(encoder.config["image_size"]), _learns(encoder.tower)
    mode, dtype = encoder.training, next(encoder.tower.parameters()).dtype
    pixels = torch.zeros(1, 3, side, side, dtype=dtype, device="meta")
    assert encoder.tokens_per_image  # is found once, which takes values
    checkpoint_blocks(encoder.eval().tower, False)
    with torch.set_grad_enabled(learns):
        network, features = _measure(encoder, tower_blocks(encoder.tower), pixels, learns, mixed)
    encoder.train(mode)
    return network, features


def measure_projector(projector: Projector, features: Tensor, mixed: torch.dtype | None) -> Network:
    """Returns what the features of one image cost in a projector.

    Args:
        projector: Built, on any device.
        features: As returned by `measure_tower`.
        mixed: As there.
    """
    projector.checkpoint_activations(False)
    dtype = features.dtype if mixed else next(projector.parameters()).dtype
    like = torch.zeros(features.shape, dtype=dtype, device="meta", requires_grad=features.requires_grad)
    return _measure(projector, [projector.layers], like, _learns(projector), mixed)[0]


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _measure(
    network: nn.Module, blocks: Sequence[nn.Module], like: Tensor, learns: bool, mixed: torch.dtype | None
) -> tuple[Network, Tensor]:
    """Counts operations and saved bytes of a network, exactly, without values; `like` is its input for one image."""
    passes = []
    # Casts of weights are kept once, whatever the number of images: a second number tells them apart.
    for images in (1, 2) if mixed else (1,):
        with _without_values(network, mixed) as (device, tensors):
            shape = (images, *like.shape[1:])
            inputs = torch.zeros(shape, dtype=like.dtype, device=device, requires_grad=like.requires_grad)
            passes.append(_pass(network, tensors, inputs, _Kept(blocks)))
    forward, backward, kept, features = passes[0]
    outside, inside, block = kept.outside, kept.inside, kept.block
    if mixed:
        more = passes[1][2]
        outside, inside, block = more.outside - outside, more.inside - inside, more.block - block
    return Network(
        forward=forward,
        backward=backward,
        saved=outside + inside,
        learns=learns,
        fixed=kept.outside + kept.inside - outside - inside,
        again=outside + kept.inputs,
        fixed_again=kept.outside - outside + kept.block - block,
        block=block,
        repeated=kept.operations,
    ), features


@contextmanager
def _without_values(network: nn.Module, mixed: torch.dtype | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields a device and the tensors of a network there.

    Without autocast they are its own. The meta device knows no autocast; pretended tensors of a CPU do, and there
    attention keeps what it keeps on a GPU.
    """
    own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    if mixed is None:
        yield str(next(network.parameters()).device), own
        return
    with FakeTensorMode():
        pretended = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cpu", requires_grad=t.requires_grad)
            for name, t in own.items()
        }
        with torch.autocast("cpu", mixed):
            yield "cpu", pretended


@dataclass
class _Kept:
    """Bytes that a pass keeps for the backward pass, apart for blocks that could be computed again.

    Attributes:
        blocks: These blocks.
        outside: Bytes of no block.
        inside: Bytes of all blocks together.
        block: Bytes of the largest.
        inputs: Bytes that blocks read.
        operations: Operations of all blocks.
    """

    blocks: Sequence[nn.Module]
    outside: int = 0
    inside: int = 0
    block: int = 0
    inputs: int = 0
    operations: int = 0
    _here: int | None = None
    _seen: set[StorageWeakRef] = field(default_factory=set)

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts a tensor that is kept, each storage once."""
        storage = StorageWeakRef(tensor.untyped_storage())
        size = 0 if storage in self._seen else tensor.untyped_storage().nbytes()
        self._seen.add(storage)
        if self._here is None:
            self.outside += size
        else:
            self._here += size
        return tensor

    @contextmanager
    def watching(self, own: Sequence[Tensor], counter: FlopCounterMode) -> Iterator[None]:
        """Counts what is kept inside the `with` block beside a network's own tensors."""
        self._seen = {StorageWeakRef(tensor.untyped_storage()) for tensor in own}

        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._here = 0
            self.inputs += sum(x.numel() * x.element_size() for x in inputs if isinstance(x, Tensor))
            self.operations -= counter.get_total_flops()

        def leave(_: nn.Module, _inputs: Any, _output: Any) -> None:
            here, self._here = self._here or 0, None
            self.inside, self.block = self.inside + here, max(self.block, here)
            self.operations += counter.get_total_flops()

        handles = [block.register_forward_pre_hook(enter) for block in self.blocks]
        handles += [block.register_forward_hook(leave) for block in self.blocks]
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor):
            yield
        for handle in handles:
            handle.remove()


def _pass(
    network: nn.Module, tensors: dict[str, Tensor], inputs: Tensor, kept: _Kept
) -> tuple[int, int, _Kept, Tensor]:
    """Returns operations of the forward and of the backward pass, what is kept, and the output."""
    with FlopCounterMode(display=False) as forward, kept.watching(list(tensors.values()), forward):
        output = functional_call(network, tensors, (inputs,))
    backward = 0
    if output.requires_grad:
        with FlopCounterMode(display=False) as counter:
            wanted = [t for t in (*tensors.values(), inputs) if t.requires_grad]
            torch.autograd.grad(output.sum(), wanted, allow_unused=True)
        backward = counter.get_total_flops()
    return forward.get_total_flops(), backward, kept, output
