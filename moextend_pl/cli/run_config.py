"""The complete config of a run as plain data, and as a file in its directory."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from moextend_pl.cli.config_files import BASE_KEY
from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import write_text
from moextend_pl.runs.preflight import CONFIG_FILE

PER_CALL_KEYS = ("config", BASE_KEY, "plan", "fresh", "ckpt_path", "allow_class_path")


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
        write_text(Path(trainer.default_root_dir) / name, yaml.safe_dump(plain_config(self.config), sort_keys=False))
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
