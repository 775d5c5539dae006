"""Bytes of a sound -> a waveform; the only place where sounds are decoded."""

from __future__ import annotations

import io
import math
from importlib.util import find_spec

import numpy as np

from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import SOUND_FORMATS

PACKAGES = ("soundfile", "soxr")
DECODERS = tuple(name.upper() for name in SOUND_FORMATS)
MAX_RATE = 384_000
"""Samples a second, of the best converters there are."""

MAX_CHANNELS = 16


def check_packages() -> None:
    """Refuses to go on without the libraries that sounds need.

    Raises:
        UserError: If one is not installed.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f'Sounds need {" and ".join(missing)}, not installed: pip install "moextend_pl[sound]".')


def read_sound(data: bytes, origin: str, rate: int, longest: float) -> np.ndarray:
    """Decodes a sound to one channel, the mean of all, at the rate of an encoder.

    Args:
        data: A file as WAV, FLAC or MP3.
        origin: Where it came from, for messages.
        rate: Samples a second.
        longest: Seconds.

    Returns:
        (n,) float32, about in [-1, 1].

    Raises:
        UserError: If a library is missing, the bytes are of another format, damaged or silent by lack of samples, or
            the sound is too long.
    """
    check_packages()
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            kind, own, channels = file.format, file.samplerate, file.channels
            _check(kind.removesuffix("EX"), own, channels, origin)
            # What a header says of its length is not believed: it is read up to one sample too many.
            most = -1 if math.isinf(longest) else math.floor(longest * own) + 1
            wave = file.read(most, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as error:
        raise _not_a_sound(origin, f"libsndfile says: {str(error).rstrip('.')}") from error
    if len(wave) > longest * own:
        raise UserError(f"{origin}: expected a sound of at most {longest:g} seconds, got a longer one. Cut it.")
    if not len(wave) or not np.isfinite(wave).all():
        raise _not_a_sound(origin, "it holds no samples" if not len(wave) else "it holds samples that are no numbers")
    mono = wave.mean(axis=1)
    resampled: np.ndarray = mono if own == rate else soxr.resample(mono, own, rate)
    return resampled


def sound_suffix(data: bytes, origin: str) -> str:
    """Returns the extension that a sound's file has, by its first bytes; nothing is decoded.

    Raises:
        UserError: If it is of no known kind.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "wav"
    if data[:4] == b"fLaC":
        return "flac"
    # A tag before it, or the eleven set bits that begin a frame.
    if data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] >= b"\xe0"):
        return "mp3"
    raise _not_a_sound(origin, "it begins as none of them")


def _check(kind: str, rate: int, channels: int, origin: str) -> None:
    if kind not in DECODERS:
        raise _not_a_sound(origin, f"it is {kind}")
    if not 0 < rate <= MAX_RATE or not 0 < channels <= MAX_CHANNELS:
        raise UserError(
            f"{origin}: expected a sound of up to {MAX_CHANNELS} channels at up to {MAX_RATE} Hz, got {channels} at "
            f"{rate} Hz. Convert it."
        )


def _not_a_sound(origin: str, found: str) -> UserError:
    return UserError(f"{origin}: expected a sound as {', '.join(DECODERS)}; {found}. Convert or copy it again.")
