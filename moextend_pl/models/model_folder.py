"""Configurations of transformers models in folders, read before any weight is."""

from __future__ import annotations

from textwrap import shorten

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from moextend_pl.contracts import UserError

REASON = 240  # characters of another library's complaint


def read_config(folder: str) -> PreTrainedConfig:
    """Reads the configuration of a transformers model.

    Args:
        folder: Folder with a `config.json`.

    Raises:
        UserError: If the file is damaged, or of a model that the installed transformers does not know.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
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
