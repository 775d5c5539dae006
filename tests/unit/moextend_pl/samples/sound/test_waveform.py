"""Sounds as people have them become what an encoder was trained on, or a sentence."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import soundfile
from helpers.sounds import RATE, sound_file, wave

from moextend_pl.contracts import UserError
from moextend_pl.samples.sound.waveform import read_sound, sound_suffix


@pytest.mark.parametrize(("kind", "loss"), [("WAV", 1e-3), ("FLAC", 1e-3), ("MP3", 0.1)])
@pytest.mark.parametrize("rate", [8_000, RATE, 44_100])
def test_any_rate_and_format_gives_the_same_tone(kind: str, loss: float, rate: int) -> None:
    data = sound_file(wave(1, 0.5, rate), rate, kind)
    assert sound_suffix(data, "x") == kind.lower()
    heard = read_sound(data, "x", RATE, 1.0)
    assert heard.dtype == np.float32
    assert abs(len(heard) / RATE - 0.5) < 0.1  # an MP3 has whole frames, and silence around
    loudest = np.abs(np.fft.rfft(heard)).argmax() / (len(heard) / RATE)
    assert abs(loudest - 440) < 4
    if rate == RATE:
        np.testing.assert_allclose(heard[1000:7000].std(), wave(1)[1000:7000].std(), rtol=max(loss, 0.02))


def test_channels_are_averaged() -> None:
    left, right = wave(0), wave(2)
    heard = read_sound(sound_file(np.stack([left, right], axis=1)), "x", RATE, 1.0)
    np.testing.assert_allclose(heard, (left + right) / 2, atol=1e-4)


def _nan() -> bytes:
    import io

    stream = io.BytesIO()
    soundfile.write(stream, np.full(100, np.nan), RATE, format="WAV", subtype="FLOAT")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "x: expected a sound as WAV, FLAC, MP3; libsndfile says"),
        (b"RIFF\0\0\0\0WAVEnonsense", "x: expected a sound as WAV"),
        (sound_file(wave(0))[:40], "x: expected a sound as WAV"),
        (sound_file(wave(0), kind="FLAC")[:60], "x: expected a sound as WAV"),
        (sound_file(wave(0), kind="AIFF"), "it is AIFF"),
        (sound_file(wave(0)[:0]), "it holds no samples"),
        (_nan(), "samples that are no numbers"),
        (sound_file(wave(0, 1.2)), "x: expected a sound of at most 1 seconds, got a longer one"),
        (sound_file(np.zeros((10, 17), dtype=np.float32)), "up to 16 channels at up to 384000 Hz, got 17"),
    ],
)
def test_what_is_no_usable_sound_is_told(data: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_sound(data, "x", RATE, 1.0)


def test_a_file_of_no_known_kind_has_no_extension() -> None:
    with pytest.raises(UserError, match="it begins as none of them"):
        sound_suffix(b"OggS", "x")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "moextend_pl.samples.sound.waveform.find_spec", lambda name: None if name == "soxr" else find(name)
    )
    with pytest.raises(UserError, match=r'Sounds need soxr, not installed: pip install "moextend_pl\[sound\]"'):
        read_sound(sound_file(wave(0)), "x", RATE, 1.0)
