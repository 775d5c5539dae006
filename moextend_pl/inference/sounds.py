"""Sounds from wherever a question names them, as the data reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from moextend_pl.contracts import Sample, SampleSpec, UserError
from moextend_pl.inference.pictures import read_place
from moextend_pl.samples.messages import Question, Sound
from moextend_pl.samples.sound.features import SoundTransform, with_sounds


def check_hears(questions: Sequence[Question], spec: SampleSpec) -> None:
    """Refuses sounds for a model that does not hear.

    Raises:
        UserError: If a question has one.
    """
    if not spec.sounds and any(question.sounds for question in questions):
        raise UserError(
            "Expected pictures and texts for a model that does not hear, got a sound. Ask a model with `hearing`."
        )


def open_sound(sound: Sound) -> tuple[bytes, str]:
    """Returns the file of a sound, WAV, FLAC or MP3, and its name for messages.

    Args:
        sound: Its bytes, a file, an `https` address or a `data:` address.

    Raises:
        UserError: If it cannot be read, is too large, or takes too long to come.
    """
    return (sound, "the sound") if isinstance(sound, bytes) else read_place(str(sound), "sound")


def heard(sample: Sample, spec: SampleSpec, sounds: Sequence[Sound]) -> Sample:
    """Returns a prompt with its sounds.

    Args:
        sample: The prompt, with a placeholder for each token of each sound.
        spec: What the model asks of its data.
        sounds: In the order of their marks.

    Raises:
        UserError: If one cannot be read.
    """
    transform, opened = SoundTransform(spec), [open_sound(sound) for sound in sounds]
    # Named by content, as in the data: what was heard is kept by name.
    names = [hashlib.blake2b(data, digest_size=8).hexdigest() for data, _ in opened]
    return with_sounds(sample, spec, [transform(data, origin) for data, origin in opened], names)
