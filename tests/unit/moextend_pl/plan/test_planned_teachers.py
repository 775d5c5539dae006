"""What `plan` counts of a frozen teacher, against a real one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.distilled import student, teaching_run
from helpers.real_steps import counter, make_step, size
from helpers.tiny_world import TinyWorld

from moextend_pl.distillation.losses import LogitTerm
from moextend_pl.distillation.relations import RelationTerm
from moextend_pl.distillation.teacher import TeacherSpec
from moextend_pl.models.moextend import MoExtend
from moextend_pl.plan.cost import RunShape, learned_tokens, memory
from moextend_pl.plan.facts import ModelShape, Part
from moextend_pl.plan.operations import operations
from moextend_pl.plan.shapes import read_shape


@pytest.fixture(scope="module")
def specs(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TeacherSpec]:
    run = teaching_run(tiny_world, tmp_path_factory.mktemp("teacher") / "run")
    base = str(tiny_world.base)
    quantised = TeacherSpec(base=base, quantize="nf4")
    return {"run": TeacherSpec(str(run)), "base": TeacherSpec(base=base), "own": TeacherSpec(), "nf4": quantised}


def teacher_part(shape: ModelShape) -> Part | None:
    return next((part for part in shape.parts if part.name == "teacher"), None)


@pytest.mark.parametrize("name", ["run", "base", "own"])
def test_operations_and_bytes_are_those_of_a_real_teacher(
    tiny_world: TinyWorld, specs: dict[str, TeacherSpec], name: str
) -> None:
    terms: list[Any] = [RelationTerm() if name == "run" else LogitTerm(scope="text")]
    step = make_step(tiny_world, ["projector"], torch.float32, lambda: student(tiny_world, terms, specs[name]))
    teacher, part = step.model.teacher.model, teacher_part(step.shape)
    if isinstance(teacher, MoExtend):
        teacher.features.clear()  # as of pictures that it was not shown yet
    with counter() as counted:
        step.model.teach(step.model.with_host_facts(step.batch))
    assert operations(step.shape, step.run).teacher == pytest.approx(counted.get_total_flops(), rel=0.02)
    held = [] if teacher is None else [*teacher.parameters(), *teacher.buffers()]
    assert memory(step.shape, step.run).weights == size([*step.model.parameters(), *step.model.buffers(), *held])
    assert (part.parameters if part else 0) == sum(p.numel() for p in (teacher.parameters() if teacher else ()))
    assert part is None or part.learning == part.cut == 0  # every process holds it whole
    asked = learned_tokens(step.shape, replace(step.run, learned=None))
    pictures = step.run.images * step.shape.tokens_per_image
    assert asked == step.run.length - (0 if name == "run" else pictures)


def test_a_teacher_in_four_bits_takes_what_such_a_base_takes(
    tiny_world: TinyWorld, specs: dict[str, TeacherSpec]
) -> None:
    shapes = {}
    for name in ("base", "nf4"):
        model = student(tiny_world, [LogitTerm(scope="text")], specs[name])
        with torch.device("meta"):
            model.configure_model()
        shapes[name] = read_shape(model, 4)
    whole, packed = (teacher_part(shapes[name]) for name in ("base", "nf4"))
    with torch.device("meta"):
        base = tiny_world.language()
        base.configure_model()
    run = RunShape(gpus=1, micro_batch=1, accumulate=1, steps=1, length=64, mean_length=64)
    alone = [memory(read_shape(base.requires_grad_(False), 4), replace(run, nf4=nf4)).weights for nf4 in (False, True)]
    assert whole.bytes - packed.bytes == pytest.approx(alone[0] - alone[1], abs=1)
    assert packed.dtype == "nf4"
