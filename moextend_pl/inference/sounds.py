"""Sounds from wherever a question names them, as the data reads them."""

from __future__ import annotations

from collections.abc import Sequence

from moextend_pl.contracts import Sample, SampleSpec, UserError
from moextend_pl.inference.pictures import read_place
from moextend_pl.samples.messages import Question, Sound
from moextend_pl.samples.pixels import content_name
from moextend_pl.samples.sound.features import SoundTransform, with_sounds
from moextend_pl.samples.sound.waveform import sound_suffix


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
        UserError: If it cannot be read, is of another kind by its first bytes, is too large, or takes too long to come.
    """
    data, origin = (sound, "the sound") if isinstance(sound, bytes) else read_place(str(sound), "sound")
    sound_suffix(data, origin)
    return data, origin


def check_sound(sound: Sound, spec: SampleSpec) -> None:
    """Refuses a sound that a model cannot be asked about.

    Raises:
        UserError: If it cannot be read, is damaged or too long, or the model does not hear.
    """
    SoundTransform(spec)(*open_sound(sound))


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
    features = [transform(data, origin) for data, origin in opened]
    return with_sounds(sample, spec, features, [content_name(data) for data, _ in opened])
