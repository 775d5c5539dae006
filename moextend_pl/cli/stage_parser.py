"""What the parser of a stage may open and import, and what it has parsed as plain data and as a file of the run."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, set_parsing_settings
from jsonargparse._common import parsing_settings
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from moextend_pl.cli.config_files import BASE_KEY
from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import write_text
from moextend_pl.runs.metrics_log import GoesOn
from moextend_pl.runs.preflight import CONFIG_FILE
from moextend_pl.runs.sources import flatten

STANDING_IN_RUNS = ("TensorBoardRun", "WandbRun", "MLflowRun")
PER_CALL_KEYS = ("config", BASE_KEY, "plan", "fresh", "ckpt_path", "allow_class_path")


class StageParser(LightningArgumentParser):
    """Takes every value as it stands: none is tried as the name of a file whose content would take its place."""

    def _add_signature_parameter(self, *args: Any, **kwargs: Any) -> None:
        # The one door through which arguments of a class come; what is nested in them inherits the option.
        super()._add_signature_parameter(*args, **{**kwargs, "sub_configs": False})


@contextmanager
def guarded_parsing(packages: Sequence[str]) -> Iterator[None]:
    """Lets parsers import from some packages only, whatever key names the code, and read local files only.

    Args:
        packages: Dotted names; everything below them is allowed.
    """
    # The library keeps these for the whole process, and has no way to take a rule back.
    before = dict(parsing_settings)
    set_parsing_settings(
        config_read_mode_fsspec_enabled=False,
        validate_subclass_spec_in_any=True,  # else a class that may not be imported is kept as a mapping
        import_path_denylist=["*"],
        import_path_allowlist=list(packages),
    )
    try:
        yield
    finally:
        parsing_settings.update(before)
        set_parsing_settings(config_read_mode_fsspec_enabled=True)  # as Lightning sets it when it is imported


class SaveRunConfig(SaveConfigCallback):
    """Writes the complete config of a run into its directory: `config.yaml`, or `config.<command>.yaml` beside it.

    What belongs to one call only (`--config`, `--ckpt_path`, `--fresh`) is left out, so the file can be
    given to `--config` as it is.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the file once, on the first rank."""
        if not trainer.is_global_zero or self.already_saved:
            return
        command = getattr(stage, "value", stage)  # Lightning passes an enum, whose text is not its value
        name = CONFIG_FILE if command == "fit" else f"config.{command}.yaml"
        config = plain_config(self.config)
        write_text(Path(trainer.default_root_dir) / name, yaml.safe_dump(config, sort_keys=False))
        for logger in trainer.loggers if command == "fit" else ():
            if isinstance(logger, GoesOn):
                logger.log_hyperparams(flatten(config))
        self.already_saved = True


def replace_plan(config: Namespace, path: str) -> None:
    """Lets the extend run of a config, changed in place, read another plan, for example one written by hand.

    Raises:
        UserError: If the stage reads no plan.
    """
    callbacks = config.trainer.get("callbacks") or []
    readers = [c for c in callbacks if c.class_path.endswith(".ExpertExtension") and c.init_args.get("plan")]
    if not readers:
        raise UserError("`--plan` needs a stage with an ExpertExtension callback that reads a plan, got none.")
    for callback in readers:
        callback.init_args.plan = path


def place_loggers(config: Namespace, run: str) -> None:
    """Gives the loggers of a config that stand in a run directory theirs, in place."""
    asked = config.trainer.get("logger")
    for entry in asked if isinstance(asked, list) else [asked]:
        if isinstance(entry, Namespace) and entry.class_path.rpartition(".")[2] in STANDING_IN_RUNS:
            entry.init_args.run = run


def plain_config(config: Namespace) -> dict[str, Any]:
    """Returns a parsed config as plain data, without what belongs to one call only.

    The parser's own `dump` refuses defaults that Lightning itself has, for example `Timer`'s.
    """
    return {key: _plain(value) for key, value in config.as_dict().items() if key not in PER_CALL_KEYS}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name  # the parser reads enums by name
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"  # and functions and classes by the place where they stand
    return value if isinstance(value, str | int | float | bool | None) else str(value)
