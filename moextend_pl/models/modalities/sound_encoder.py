"""Encoders of sounds from transformers: which there are, how one is read, and how many frames it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig

from moextend_pl.contracts import UserError
from moextend_pl.models.model_folder import read_config, read_model
from moextend_pl.runs.fingerprints import check_weights

KINDS = ("whisper", "audio-spectrogram-transformer", "wav2vec2", "hubert", "wavlm")
"""Families whose first argument is what their feature extractor makes of a sound."""

MASK = "masked_spec_embed"
"""A weight that only pretraining reads, which some published files leave out."""


def check_folder(folder: str) -> PreTrainedConfig:
    """Returns the configuration of an audio model.

    Args:
        folder: Folder of a transformers model.

    Raises:
        UserError: If there is none, or its family is not known here.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"Expected an audio model as `hearing.path`, found no config.json in {folder}. Correct it.")
    config = read_config(folder)
    if config.model_type not in KINDS:
        raise UserError(
            f"Expected an audio model of {', '.join(KINDS)} as `hearing.path`, got {config.model_type!r} in {folder}. "
            "Name another folder."
        )
    return config


def make_encoder(folder: str, with_weights: bool) -> Any:
    """Returns the encoder of an audio model, that of Whisper without its decoder.

    Args:
        folder: Checked.
        with_weights: Whether its weights are read.

    Raises:
        UserError: If they are damaged, or some are missing.
    """
    if with_weights:
        check_weights(Path(folder))
        model = read_model(AutoModel, folder, lambda name: MASK in name, dtype=torch.float32)
    else:
        model = AutoModel.from_config(read_config(folder), dtype=torch.float32)
    return model.encoder if model.config.model_type == "whisper" else model


def count_frames(folder: str, shape: tuple[int, ...]) -> int:
    """Returns F, the frames of a sound, from a pass on the meta device.

    Args:
        folder: Checked.
        shape: Of the features of one sound.

    Raises:
        UserError: If the encoder cannot be built, or does not take such features.
    """
    with torch.device("meta"):
        try:
            encoder = make_encoder(folder, with_weights=False).eval()
            return int(encoder(torch.zeros(1, *shape)).last_hidden_state.shape[1])
        except UserError:
            raise
        except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:
            raise UserError(
                f"The encoder in {folder} does not take what its feature extractor makes, {shape} a sound "
                f"({' '.join(str(error).split())[:160]}). Take config.json and preprocessor_config.json from one model."
            ) from error
