"""The model of a stage file on the meta device: parsed, grown and frozen as `fit` does, without weights or data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer

from moextend_pl.cli.config_files import StageArguments, prepare_arguments
from moextend_pl.cli.stage import MoExtendCLI
from moextend_pl.cli.stage_parser import plain_config, replace_plan
from moextend_pl.cli.trainer_settings import sharing_of
from moextend_pl.contracts import PLAN_FILE, UserError
from moextend_pl.distillation.distill import Distill
from moextend_pl.models.base_model import ComputeSpec
from moextend_pl.models.encoder import TIMM
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.manifest import MANIFEST_FILE
from moextend_pl.runs.preflight import PLAN_ARGUMENTS
from moextend_pl.training.sharding.strategy import check_parts
from moextend_pl.training.stage import StageModule

COMMAND = "fit"
CONFIG = "config.json"
# Argument of the model that names a folder of weights -> folder beside the stage file with its config.json.
STAND_INS = {"init_args.base": "model", "init_args.name": "tower"}
# Lightning's short names of precisions.
PRECISIONS = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
DTYPES = {"64": torch.float64, "32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StageModel:
    """A stage as `fit` would run it.

    Attributes:
        module: The model on the meta device, in the run's precision.
        config: The parsed config as plain data.
        precision: `trainer.precision`.
        notes: What was taken from beside the stage file because it is not there yet.
    """

    module: StageModule
    config: dict[str, Any]
    precision: str
    notes: tuple[str, ...]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type in which values outside the experts are computed."""
        return DTYPES[self.precision.partition("-")[0]]

    @property
    def compute(self) -> ComputeSpec:
        """How its language model computes, if it has one."""
        compute: ComputeSpec = getattr(getattr(self.module, "language", self.module), "compute", ComputeSpec())
        return compute

    @property
    def mixed(self) -> torch.dtype | None:
        """Type in which autocast computes; None without it."""
        return self.compute_dtype if self.is_mixed else None

    @property
    def is_mixed(self) -> bool:
        """Whether autocast computes in another type than the weights have."""
        return self.precision.endswith("-mixed")


class _StageReader(MoExtendCLI):
    """Parses like `fit` and builds the unbuilt model and the callbacks that declare plans; nothing else."""

    def __init__(self, arguments: StageArguments) -> None:
        self.notes: list[str] = []
        super().__init__(arguments)

    def _set_seed(self) -> None:
        """Does nothing: no value is drawn."""

    def before_instantiate_classes(self) -> None:
        """Leaves out what needs a run, and puts stand-ins for what is not there yet."""
        config = self.config[COMMAND]
        if config.get("plan"):
            replace_plan(config, config["plan"])
        self.plain = plain_config(config)
        self.notes = use_stand_ins(config, self._arguments.files)
        config["trainer.callbacks"] = declaring_callbacks(config)
        config["trainer.logger"] = config["trainer.plugins"] = None

    def after_instantiate_classes(self) -> None:
        """Does nothing: there is no checkpoint."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds no trainer, whose devices may not be here; keeps the callbacks."""
        self.declaring: list[Callback] = list(self.config_init[COMMAND]["trainer"]["callbacks"])
        return None  # type: ignore[return-value]

    def _run_subcommand(self, subcommand: str) -> None:
        """Does nothing."""


def declaring_callbacks(config: Namespace) -> list[Namespace]:
    """Returns the entries of `trainer.callbacks` that decide what grows or learns."""
    callbacks = config.get("trainer.callbacks") or []
    entries = callbacks if isinstance(callbacks, list) else [callbacks]
    return [entry for entry in entries if any(name in (entry.get("init_args") or {}) for name in PLAN_ARGUMENTS)]


def use_stand_ins(config: Namespace, files: Sequence[Path]) -> list[str]:
    """Replaces folders and files that are not there yet by those beside the stage file.

    Weights are replaced by `model/` and `tower/`, of which only `config.json` is read, the probe's plan by
    `extension_plan.yaml`; an earlier stage that was not run is left out, as sizes do not depend on it.

    Args:
        config: Parsed config; changed in place.
        files: Its layers; the last has the nearest folder.

    Returns:
        One sentence for each replacement.
    """
    notes = []
    for key, value in [item for item in config.items() if item[0].startswith("model.")]:
        stand_in = next((folder for end, folder in STAND_INS.items() if key.endswith(end)), None)
        if stand_in and isinstance(value, str) and not value.startswith(TIMM) and not (Path(value) / CONFIG).is_file():
            found = _beside(files, f"{stand_in}/{CONFIG}")
            if found is not None:
                config[key] = str(found.parent)
                notes.append(f"{value} is not here: shapes are those of {found}")
        if key.endswith("init_args.init_from") and value and not _is_finished(Path(value)):
            config[key] = None
            notes.append(f"{value} is not here: the stage is planned without it")
    for entry in declaring_callbacks(config):
        plan = entry.init_args.get("plan")
        found = _beside(files, PLAN_FILE) if plan and not Path(plan).is_file() else None
        if found is not None:
            entry.init_args["plan"] = str(found)
            notes.append(f"{plan} is not here: the plan is {found}")
    return notes


def _is_finished(run: Path) -> bool:
    return ((run if run.is_dir() else run.parent) / MANIFEST_FILE).is_file()


def _beside(files: Sequence[Path], name: str) -> Path | None:
    return next((file.parent / name for file in reversed(files) if (file.parent / name).is_file()), None)


def read_stage(argv: Sequence[str]) -> StageModel:
    """Builds the model of a stage on the meta device.

    Raises:
        UserError: For every mistake that `fit` would notice before it reads weights or data.
    """
    reader = _StageReader(prepare_arguments([COMMAND, *argv]))
    module = reader.model
    if not isinstance(module, StageModule):
        raise UserError(f"`plan` knows the costs of this project's models, got {type(module).__name__}.")
    if getattr(module, "hearing", None) is not None:
        raise UserError("`plan` does not know the costs of `hearing` yet. Plan the stage without it, as a lower bound.")
    trainer = reader.plain["trainer"]
    precision = str(trainer.get("precision") or "32-true")
    stage = StageModel(module, reader.plain, PRECISIONS.get(precision, precision), tuple(reader.notes))
    if stage.precision.partition("-")[0] not in DTYPES:
        raise UserError(f"`plan` does not know `trainer.precision` {stage.precision}; choose for example bf16-true.")
    for callback in reader.declaring:
        callback.setup(None, module, COMMAND)  # type: ignore[arg-type]
    if sharing := sharing_of(trainer):
        check_parts(module, sharing[0])
    with torch.device("meta"):
        module.configure_model()
    module.to(torch.float32 if stage.is_mixed else stage.compute_dtype)
    return stage


def read_teacher(student: Distill) -> MoExtend | MoELanguageModel:
    """Builds the model that a built student learns from, as frozen as it is, on the meta device and in its type.

    Raises:
        UserError: If its files are not there.
    """
    spec, own = student.teacher.spec, student.language
    with torch.device("meta"):
        if spec.run is not None:
            return MoExtend.load(spec.run, quantize=spec.quantize).requires_grad_(False).to(student.dtype)
        teacher = (
            MoELanguageModel(base=own.base or own.config, tokenizer=own.tokenizer_path, dense=own.dense)
            if spec.base is None
            else MoELanguageModel(base=spec.base, dense=spec.dense, compute=ComputeSpec(quantize=spec.quantize))
        )
        teacher.configure_model()
    return teacher.requires_grad_(False).to(student.dtype)
