"""Transformers models in folders: their configuration, read before any weight is, and their weights, all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

from moextend_pl.contracts import UserError

# Files at hand, none unpickled, and no code that comes with them, nor a question whether to run it.
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
REASON = 240  # characters of another library's complaint


def read_config(folder: str) -> PreTrainedConfig:
    """Reads the configuration of a transformers model.

    Args:
        folder: Folder with a `config.json`.

    Raises:
        UserError: If the file is damaged, or of a model that the installed transformers does not know.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        if _brings_code(Path(folder)):
            raise UserError(
                f"{folder} brings code of its own (`auto_map` in its config.json), which is never run here, and "
                "transformers does not know such a model. Update transformers, or name another base."
            ) from error
        reason = shorten(" ".join(str(error).split()).rstrip("."), REASON)
        raise UserError(
            f"{folder}/config.json is no configuration that the installed transformers can read ({reason}). Copy the "
            "model's folder again, or update transformers."
        ) from error
    return config


def is_quantised(folder: str | None) -> bool:
    """Tells whether the weights of a transformers model are stored quantised already.

    Args:
        folder: Folder with a `config.json`; None for a new model.
    """
    return folder is not None and getattr(read_config(folder), "quantization_config", None) is not None


def read_model(kind: Any, folder: str, optional: Callable[[str], bool] = lambda _: False, **options: Any) -> Any:
    """Reads a transformers model with all its weights.

    Args:
        kind: Auto class of the model.
        folder: Whose weights were checked.
        optional: Tells of the name of a weight whether the files may lack it.
        options: Of `from_pretrained`.

    Raises:
        UserError: If the files lack weights, or have them in another shape.
    """
    try:
        model, told = kind.from_pretrained(folder, output_loading_info=True, use_safetensors=True, **LOCAL, **options)
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "mismatch" not in str(error):
            raise
        raise UserError(
            f"The weights in {folder} do not fit its config.json ({shorten(' '.join(str(error).split()), REASON)}). "
            "Copy the model's folder again."
        ) from error
    if missing := [name for name in told["missing_keys"] if not optional(name)]:
        raise UserError(
            f"The files in {folder} lack {len(missing)} weights of its {type(model).__name__}, for example "
            f"{min(missing)}, which would be random. Name the folder of a whole model."
        )
    return model


def _brings_code(folder: Path) -> bool:
    try:
        return "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
