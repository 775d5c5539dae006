"""Students of the tiny world, with teachers of the tiny world."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from helpers.tiny_world import TinyWorld, make_plan, perturb

from moextend_pl.contracts import ExtensionPlan, TrainPlan
from moextend_pl.distillation.distill import Distill
from moextend_pl.distillation.losses import DistillTerm
from moextend_pl.distillation.teacher import TeacherSpec
from moextend_pl.models.delta import language_arguments, save_delta
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.projector import Projector

NEW = ("projector", "new_experts", "new_routers", "calibration")


def teaching_run(world: TinyWorld, run: Path, seed: int = 3) -> Path:
    """Writes a finished run, off its start, that can teach."""
    model = world.model(make_plan(), NEW)
    perturb([p for name in NEW for p in model.parts()[name]], seed=seed)
    save_delta(model, run)
    return run


def student(
    world: TinyWorld,
    terms: str | list[DistillTerm],
    teacher: TeacherSpec,
    plan: ExtensionPlan | None = None,
    parts: tuple[str, ...] = ("projector",),
    **options: Any,
) -> Distill:
    """Returns a student before its networks are built; `init_from` and options of the language model."""
    start = options.pop("init_from", None)
    model = Distill(
        encoder=VisionEncoder(path=str(world.encoder)),
        projector=Projector(kind="mlp2x_gelu"),
        language=MoELanguageModel(base=str(world.base), **language_arguments(options)),
        teacher=teacher,
        terms=terms,
        init_from=None if start is None else str(start),
    )
    model.extension_plan, model.train_plan = plan, TrainPlan(parts)
    return model


def lay_out_distillation(world: TinyWorld, quickstart: Path) -> None:
    """Writes a teacher, a student's language model and the student's first two stages into a quickstart's folder."""
    teaching_run(world, quickstart / "3_extend")
    shutil.copytree(world.base, quickstart / "distill" / "0_language" / "base")
    for stage, parts in (("1_dpt", ("projector",)), ("2_sft", ("projector", "language", "routers"))):
        save_delta(world.model(parts=parts), quickstart / "distill" / stage)
