"""Gives a trusted mixture-of-experts language model new senses without it losing what it knows.

The names that notebooks and stage files use stand here, and are imported when they are first used. Exported models are
known to transformers after `import moextend_pl`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moextend_pl.export.registration import register

if TYPE_CHECKING:
    from pathlib import Path

    from moextend_pl.contracts import ExtensionPlan, LayerGrowth, TrainPlan, UpcycleSpec, UserError
    from moextend_pl.distillation.distill import Distill
    from moextend_pl.distillation.losses import HiddenTerm, LogitTerm, RouterTerm
    from moextend_pl.distillation.relations import AffinityTerm, AttentionTerm, RelationTerm
    from moextend_pl.distillation.teacher import TeacherSpec
    from moextend_pl.models.encoder import VisionEncoder
    from moextend_pl.models.language import MoELanguageModel
    from moextend_pl.models.moextend import MoExtend
    from moextend_pl.models.projector import Projector
    from moextend_pl.moe.selection import (
        AllLayers,
        BudgetRule,
        DivergenceRule,
        ExplicitLayers,
        FirstLayers,
        IntervalLayers,
        LastLayers,
        LeastShiftRule,
        RandomRule,
        ShiftRule,
    )
    from moextend_pl.runs.checkpoint import AtomicCheckpointIO
    from moextend_pl.runs.metrics_log import MLflowRun, TensorBoardRun, WandbRun
    from moextend_pl.training.finite import NumbersGuard
    from moextend_pl.training.optim import OptimSpec
    from moextend_pl.training.sharding.strategy import ShardedStrategy
    from moextend_pl.training.termination import Watchdog

__version__ = "0.1.0"
__all__ = [
    "AffinityTerm",
    "AllLayers",
    "AtomicCheckpointIO",
    "AttentionTerm",
    "BudgetRule",
    "Distill",
    "DivergenceRule",
    "ExplicitLayers",
    "ExtensionPlan",
    "FirstLayers",
    "HiddenTerm",
    "IntervalLayers",
    "LastLayers",
    "LayerGrowth",
    "LeastShiftRule",
    "LogitTerm",
    "MLflowRun",
    "MoELanguageModel",
    "MoExtend",
    "NumbersGuard",
    "OptimSpec",
    "Projector",
    "RandomRule",
    "RelationTerm",
    "RouterTerm",
    "ShardedStrategy",
    "ShiftRule",
    "TeacherSpec",
    "TensorBoardRun",
    "TrainPlan",
    "UpcycleSpec",
    "UserError",
    "VisionEncoder",
    "WandbRun",
    "Watchdog",
    "load",
]

_HOMES = {
    "contracts": ("ExtensionPlan", "LayerGrowth", "TrainPlan", "UpcycleSpec", "UserError"),
    "distillation.distill": ("Distill",),
    "distillation.losses": (
        "HiddenTerm",
        "LogitTerm",
        "RouterTerm",
    ),
    "distillation.relations": (
        "AffinityTerm",
        "AttentionTerm",
        "RelationTerm",
    ),
    "distillation.teacher": ("TeacherSpec",),
    "models.encoder": ("VisionEncoder",),
    "models.language": ("MoELanguageModel",),
    "models.moextend": ("MoExtend",),
    "models.projector": ("Projector",),
    "moe.selection": (
        "AllLayers",
        "BudgetRule",
        "DivergenceRule",
        "ExplicitLayers",
        "FirstLayers",
        "IntervalLayers",
        "LastLayers",
        "LeastShiftRule",
        "RandomRule",
        "ShiftRule",
    ),
    "runs.checkpoint": ("AtomicCheckpointIO",),
    "runs.metrics_log": ("MLflowRun", "TensorBoardRun", "WandbRun"),
    "training.finite": ("NumbersGuard",),
    "training.optim": ("OptimSpec",),
    "training.sharding.strategy": ("ShardedStrategy",),
    "training.termination": ("Watchdog",),
}


def load(run: str | Path, base: str | Path | None = None, tower: str | Path | None = None) -> MoExtend:
    """Loads the model of a finished run, ready to be asked.

    Args:
        run: Run directory with `manifest.json` and `delta.safetensors`, or a delta in a hub, `org/name`.
        base: Where its base lies, if not where the run says; a delta to share finds it by name otherwise.
        tower: Where its vision tower lies, likewise.

    Raises:
        UserError: If the directory holds no finished run or its base has changed.

    Example:
        load("runs/quickstart/3_extend").generate("shape.png", "what color is the shape?")
    """
    from moextend_pl.models.moextend import MoExtend
    from moextend_pl.runs.named import find_run

    return MoExtend.load(find_run(run), base, tower)


def __getattr__(name: str) -> Any:
    # The models import torch and transformers, which takes seconds that `--help` should not.
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'moextend_pl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moextend_pl.{home}"), name)


register()
