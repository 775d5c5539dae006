"""A real step of a small model beside what `plan` is told about it: bytes that are kept, operations that are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from helpers.tiny_world import TinyWorld, make_plan
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from moextend_pl.contracts import Batch, TrainPlan
from moextend_pl.models.feature_cache import ENCODE_TOGETHER
from moextend_pl.models.moextend import MoExtend
from moextend_pl.plan.cost import RunShape
from moextend_pl.plan.facts import ModelShape
from moextend_pl.plan.shapes import read_shape
from moextend_pl.training.optim import OptimSpec, build_optimizer


@dataclass(frozen=True)
class Step:
    """A real step beside its prediction."""

    model: MoExtend
    batch: Batch
    shape: ModelShape
    run: RunShape


def predicted_positions(model: MoExtend, batch: Batch) -> int:
    """Counts the positions that the head is applied to; with transformers 5.17 whole columns of the batch."""
    positions: list[int] = []
    head = model.language.model.get_output_embeddings()
    with torch.no_grad(), head.register_forward_hook(lambda _, __, y: positions.append(y[..., 0].numel())):
        model(batch)
    return positions[0]


def make_step(
    world: TinyWorld, parts: list[str], dtype: torch.dtype, unbuilt: Callable[[], MoExtend] | None = None
) -> Step:
    """Builds a model, a batch, and what `plan` reads off the same model on the meta device.

    Args:
        world: Where the models are.
        parts: What learns; new experts grow in layers 2 and 3 if they are among it.
        dtype: Of all weights and values.
        unbuilt: Makes the model before its networks are built; by default the world's.
    """
    plan = make_plan((2, 3), init="copy", routing="open") if "new_experts" in parts else None
    model, shapes = (unbuilt() if unbuilt else world.unbuilt() for _ in range(2))
    for each in (model, shapes):
        each.extension_plan, each.train_plan = plan, TrainPlan(tuple(parts))
    model.configure_model()
    model.to(dtype).train()
    model.encoder.eval()
    model.cache_features = False
    batch = world.batch(model, "iiittiii" * 2)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    with torch.device("meta"):
        shapes.configure_model()
    return Step(model, batch, read_shape(shapes.to(dtype), dtype.itemsize), _run_shape(model, batch, dtype))


def _run_shape(model: MoExtend, batch: Batch, dtype: torch.dtype) -> RunShape:
    sequences, length = batch["input_ids"].shape
    with torch.no_grad(), model.language.watch.recording() as records:
        model.language(batch, model.embed(batch))
    experts = min((record.num_experts for record in records), default=0)
    grown = [record.indices for record in records if record.num_experts > experts]
    return RunShape(
        gpus=1,
        micro_batch=sequences,
        accumulate=1,
        steps=1,
        length=length,
        mean_length=length,
        images=len(batch["image_keys"]) / sequences,
        encoded_together=ENCODE_TOGETHER,
        compute_bytes=dtype.itemsize,
        nf4=model.language.compute.quantize == "nf4",
        new_share=float((torch.cat(grown) >= experts).float().mean()) if grown else None,
        learned=predicted_positions(model, batch) / sequences,
        on_cpu=True,
        recompute=model.language.compute.activation_checkpointing,
        recompute_images=model.activation_checkpointing,
    )


def size(tensors: list[Tensor]) -> int:
    """Returns the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def saved_bytes(model: MoExtend, batch: Batch) -> tuple[Tensor, int]:
    """Returns the loss and the bytes of the storages that its graph keeps and that are no parameters."""
    own = {StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    kept: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage not in own:
            kept[storage] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch).loss
    return loss, sum(kept.values())


def grouped_flops(left: Tensor, right: Tensor, offs: Tensor, *_: object, **__: object) -> int:
    """Counts a grouped product, which torch's counter does not know: rows past the last group are not computed."""
    rows, inner = int(offs[-1]), right.shape[1] if right.dim() == 3 else left.shape[0]
    return 2 * rows * inner * right.shape[-1]


grouped_flops._get_raw = True  # type: ignore[attr-defined] # hands over tensors where others get shapes


def counter() -> FlopCounterMode:
    """Returns torch's counter, with the operations it lacks."""
    aten = torch.ops.aten
    # The counter of torch 2.11 has no entry for attention on a CPU; its formula is the same everywhere.
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping={aten._grouped_mm: grouped_flops, **attention})


def measured_bytes(step: Step) -> tuple[int, int, int, int]:
    """Takes the step and returns the bytes of weights, gradients, optimizer and what was kept for the backward pass."""
    learning = [p for p in step.model.parameters() if p.requires_grad]
    optimizer, _ = build_optimizer(learning, OptimSpec(), total_steps=1)
    loss, activations = saved_bytes(step.model, step.batch)
    loss.backward()
    optimizer.step()
    weights = size([*step.model.parameters(), *step.model.buffers()])
    gradients = size([p.grad for p in learning if p.grad is not None])
    moments = size([value for state in optimizer.state.values() for value in state.values()])
    return weights, gradients, moments, activations


class LivePeak(TorchDispatchMode):
    """Watches the largest sum of bytes of tensors made inside of it that lived at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts what is alive after it."""
        known = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and StorageWeakRef(tensor.untyped_storage()) not in known:
                self._live[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        self.bytes = max(self.bytes, sum(self._live.values()))
        return result
