"""Waveform -> what an encoder of sounds takes, by transformers' own feature extractor.

Shapes: N sounds of a sample, n samples of a waveform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor

from moextend_pl.contracts import Sample, SampleSpec, UserError
from moextend_pl.samples.sound.waveform import MAX_RATE, read_sound

PREPROCESSOR = "preprocessor_config.json"
AST_HOP = 0.01
"""Seconds between two frames of a Kaldi filter bank, which AST's extractor leaves at its default."""

SHORTEST = 10
"""A tenth of a second: what is shorter is filled, since some extractors want at least one frame."""


@lru_cache(maxsize=4)
def read_extractor(folder: str) -> Any:
    """Reads the feature extractor of an audio model; one a process.

    Args:
        folder: With its `preprocessor_config.json`.

    Raises:
        UserError: If there is none, or it is not of sounds.
    """
    try:
        extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not 0 < int(extractor.sampling_rate) <= MAX_RATE:
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"Expected the feature extractor of an audio model in {Path(folder) / PREPROCESSOR}, got "
            f"{type(error).__name__}. Take the file from where the model's weights come from."
        ) from error
    return extractor


def own_window(extractor: Any) -> float | None:
    """Returns how many seconds an extractor pads every sound to; None if it leaves their length."""
    if hasattr(extractor, "chunk_length"):
        return float(extractor.chunk_length)
    if hasattr(extractor, "num_mel_bins"):
        return float(extractor.max_length) * AST_HOP
    return None


class SoundTransform:
    """A sound's file -> features of the one size that all sounds of a model have, the end filled with silence.

    Args:
        spec: What the model asks of its data.
    """

    def __init__(self, spec: SampleSpec) -> None:
        self.folder, self.seconds = spec.sounds, spec.sound_seconds

    @cached_property
    def extractor(self) -> Any:
        """The feature extractor, read at the first sound."""
        return read_extractor(self.folder)

    def __call__(self, data: bytes, origin: str) -> np.ndarray:
        """Returns the features of one sound.

        Raises:
            UserError: As `read_sound`, and if the model does not hear.
        """
        if not self.folder:
            raise UserError(
                f"{origin}: expected text and pictures for a model that does not hear, got a sound. Give the model "
                "`hearing`, or leave the sample out."
            )
        return self.of_wave(read_sound(data, origin, int(self.extractor.sampling_rate), self.seconds))

    def of_wave(self, wave: np.ndarray) -> np.ndarray:
        """Returns the features of a waveform (n,) at the extractor's rate."""
        rate = int(self.extractor.sampling_rate)
        wave = np.pad(wave, (0, max(0, rate // SHORTEST - len(wave))))
        options: dict[str, Any] = {}
        if own_window(self.extractor) is None:
            options = {"padding": "max_length", "max_length": math.ceil(self.seconds * rate)}
        found = self.extractor(wave, sampling_rate=rate, return_tensors="np", **options)
        features: np.ndarray = np.asarray(found[self.extractor.model_input_names[0]][0], dtype=np.float32)
        return features


def with_sounds(sample: Sample, spec: SampleSpec, features: Sequence[np.ndarray], names: Sequence[str]) -> Sample:
    """Returns a sample with the sounds whose placeholders it holds; a truncated one may hold fewer.

    Args:
        sample: As `ConversationEncoder` made it.
        spec: What the model asks of its data.
        features: One for each `<sound>` of the conversation.
        names: Likewise.
    """
    if not features:
        return sample
    kept = int((sample.input_ids == spec.image_token_id + 1).sum()) // max(spec.tokens_per_sound, 1)
    if not kept:
        return sample
    sounds = torch.from_numpy(np.stack(features[:kept]))
    return replace(sample, sounds=sounds, sound_keys=list(names[:kept]))
