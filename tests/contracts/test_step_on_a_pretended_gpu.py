"""A whole training step of every kind of stage on a pretended CUDA device, on machines that have none.

Under FakeTensorMode tensors have a shape, a type and a device, and no values. An operation that mixes devices raises,
and so does one that asks for a value, `.item()`, `bool(tensor)`, `nonzero`, indexing with booleans, or that takes one
from the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distilled import student, teaching_run
from helpers.tiles import SIZES, photo, tiled, write_tagged_base
from helpers.tiny_world import GROWN, QUESTION, TinyWorld, make_plan, perturb
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moextend_pl.contracts import Batch, ExtensionPlan, TrainPlan, UpcycleSpec
from moextend_pl.distillation.distill import Distill
from moextend_pl.distillation.losses import HiddenTerm, LogitTerm, RouterTerm
from moextend_pl.distillation.relations import AffinityTerm, AttentionTerm, RelationTerm
from moextend_pl.distillation.teacher import TeacherSpec
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend
from moextend_pl.samples.collate import collate_packed
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import PixelTransform
from moextend_pl.samples.turns import Turn
from moextend_pl.training.finite import Step, skip_step
from moextend_pl.training.optim import OptimSpec, build_optimizer

NEW = ("new_experts", "new_routers", "calibration")
EXTEND = (*NEW, "projector")


def move(module: nn.Module, device: str) -> None:
    """Puts every parameter and buffer on a device where it has no values."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                part._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


class NothingFromTheHost(TorchDispatchMode):
    """Refuses an operation on the device that takes a tensor of the host: it is copied, and a GPU waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = {one.device.type for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        assert not ("cpu" in devices and len(devices) > 1), f"{func} mixes {devices}"
        return func(*args, **(kwargs or {}))


def step(model: MoExtend, batch: Batch) -> None:
    """Does what a trainer does with a batch, from the transfer to the optimizer's step.

    Autograd asks a real driver for a CUDA device, so that the backward pass runs on the meta device, which has no
    values either and refuses the same operations.
    """
    batch = model.on_before_batch_transfer(batch, 0)
    # Grouped products are told their shapes in 16 bits only.
    model.to(torch.bfloat16).train()
    teacher = model.teacher.model if isinstance(model, Distill) else None
    moved = [model] if teacher is None else [model, teacher.to(torch.bfloat16)]
    model.cache_features = False  # of one device
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for each in moved:
            move(each, "cuda")
        there = elsewhere(batch, "cuda")
        with NothingFromTheHost():
            assert model(there).loss.device.type == "cuda"
    for each in moved:
        move(each, "meta")
    there = elsewhere(batch, "meta")
    optimizer, scheduler = build_optimizer(model.parameters(), OptimSpec(), total_steps=10)
    loss, guarded = model.by_tokens(model(there).loss, there["labels"]), Step()
    with NothingFromTheHost():
        loss.backward()
    guarded.bad_loss = loss.detach().isfinite().logical_not()
    skip_step(optimizer, guarded.judge(dict(model.named_parameters()), loss.device))
    assert len(guarded.gradients) == sum(p.requires_grad for p in model.parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    scheduler.step()


def elsewhere(batch: Batch, device: str) -> Batch:
    def empty(value: torch.Tensor) -> torch.Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device=device)

    moved: Any = tree_map_only(torch.Tensor, empty, batch)
    return moved


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks the card what it can do."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def built(world: TinyWorld, plan: ExtensionPlan | None, parts: tuple[str, ...], **options: Any) -> MoExtend:
    model = world.model(plan, parts, **options)
    assert model.language.image_token_id  # reads the tokenizer while values are real
    return model


def second_task(world: TinyWorld, folder: Path) -> MoExtend:
    first = built(world, make_plan(task="shape"), NEW)
    perturb([p for name in NEW for p in first.parts()[name]])
    save_delta(first, folder / "a")
    second = world.unbuilt(init_from=folder / "a")
    second.extension_plan, second.train_plan = make_plan((1, 2), task="colour"), TrainPlan(NEW)
    second.configure_model()
    assert second.language.image_token_id
    return second


def third_stage_of_cumo(world: TinyWorld, _: Path, again: bool = False) -> MoExtend:
    spec = UpcycleSpec(experts=4, top_k=2)
    model = world.cumo(again=again, encoder=spec, projector=spec, language=spec)
    model.train_plan = TrainPlan(("encoder", "projector", "language", "routers"))
    model.configure_model()
    assert model.language.image_token_id
    return model


def looking(world: TinyWorld, folder: Path, thumbnail: bool = False) -> MoExtend:
    base = write_tagged_base(world, folder / "base") if thumbnail else str(world.base)
    model = tiled(world, base, 6 if thumbnail else 1, looks=2, thumbnail=thumbnail)
    model.extension_plan, model.train_plan = make_plan(routing="masked"), TrainPlan(EXTEND)
    model.configure_model()
    assert model.language.image_token_id
    return model


def distilled(world: TinyWorld, folder: Path) -> MoExtend:
    """All terms, from a whole model."""
    run = teaching_run(world, folder / "teacher")
    every = [LogitTerm(scope="all"), HiddenTerm(), RelationTerm(), AffinityTerm(), AttentionTerm(), RouterTerm()]
    parts = (*EXTEND, "distillation")
    model = student(world, every, TeacherSpec(run=str(run)), make_plan(), parts, attn_implementation="eager")
    model.configure_model()
    teacher = model.teacher.model
    assert isinstance(teacher, MoExtend)
    teacher.cache_features = False  # of one device
    assert model.language.image_token_id == teacher.language.image_token_id
    return model


def guarded(world: TinyWorld, _: Path) -> MoExtend:
    model = student(world, [LogitTerm(scope="text")], TeacherSpec(), make_plan(routing="open"), EXTEND)
    model.configure_model()
    assert model.language.image_token_id
    return model


STAGES: dict[str, Callable[[TinyWorld, Path], MoExtend]] = {
    "align": lambda world, _: built(world, None, ("projector",)),
    "probe": lambda world, _: built(world, None, ("routers",)),
    "extend masked": lambda world, _: built(world, make_plan(routing="masked"), EXTEND),
    "extend masked_tokens": lambda world, _: built(world, make_plan(routing="masked_tokens"), EXTEND),
    "extend open": lambda world, _: built(world, make_plan(routing="open"), EXTEND),
    "extend copy": lambda world, _: built(world, make_plan(routing="masked", init="copy"), EXTEND),
    "extend by two experts": lambda world, _: built(world, make_plan(GROWN, (1, 2)), EXTEND),
    "second task": second_task,
    "extend by cross-attention": looking,
    "CuMo stage 3": third_stage_of_cumo,
    "CuMo stage 3 computed again": partial(third_stage_of_cumo, again=True),
}


@pytest.mark.parametrize("kinds", ["iti", "ttt"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_mixes_no_devices_and_asks_the_device_for_no_value(
    tiny_world: TinyWorld, tmp_path: Path, stage: str, kinds: str
) -> None:
    model = STAGES[stage](tiny_world, tmp_path)
    batch = tiny_world.batch(model, kinds)
    batch["tasks"] = ["colour", "shape", "colour"]
    step(model, batch)


@pytest.mark.parametrize("make", [distilled, guarded])
def test_a_step_with_a_teacher_asks_the_device_for_no_value(
    tiny_world: TinyWorld, tmp_path: Path, make: Callable[[TinyWorld, Path], MoExtend]
) -> None:
    model = make(tiny_world, tmp_path)
    step(model, tiny_world.batch(model, "iti"))


def test_a_step_that_reads_thumbnails_and_looks_at_tiles_asks_the_device_for_no_value(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    model = looking(tiny_world, tmp_path, thumbnail=True)
    encoder, transform = ConversationEncoder(model.sample_spec()), PixelTransform(model.sample_spec())
    samples = []
    for number in range(3):
        pixels = [] if number == 1 else [transform(photo(SIZES[number + 1]))]
        turns = (Turn("<image>\n" * len(pixels) + QUESTION, "red"),)
        samples.append(encoder.encode("k", turns, pixels, [f"p{number}"] * len(pixels)))
    batch = collate_packed([samples[:1], samples[1:]], 0)
    assert model.with_host_facts(batch)["known"].looked.shape == (3, 2, 6)
    step(model, batch)


def test_a_step_over_packed_rows_asks_the_device_for_no_value(tiny_world: TinyWorld) -> None:
    model = built(tiny_world, make_plan(task="colour"), EXTEND)
    rows = [tiny_world.samples(model, "it"), tiny_world.samples(model, "tt")]
    batch = collate_packed(rows, 0)
    batch["tasks"] = ["colour", "shape", "colour", "shape"]
    step(model, batch)


def test_an_operation_that_asks_for_a_value_is_found() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.empty(3, device="cuda").any())
