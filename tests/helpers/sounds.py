"""Sounds of the tiny world: tones as files, a tiny Whisper, and what hears them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from helpers.tiny_world import COLOURS, QUESTION, TinyWorld, colour_of, picture
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from datamodules.shards import Entry, conversation
from moextend_pl.contracts import Batch, ExtensionPlan, Sample, TrainPlan
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.modalities.hearing import Hearing
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.samples.collate import collate_generation, collate_training
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import PixelTransform, decode_image
from moextend_pl.samples.sound.features import SoundTransform, with_sounds
from moextend_pl.samples.turns import Turn

RATE, MELS, FRAMES, TOKENS = 16_000, 16, 50, 3
PITCHES = (220, 440, 880, 1760)


def wave(number: int, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    """Returns a tone whose pitch depends on the number, (n,)."""
    times = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * PITCHES[number % len(PITCHES)] * times)).astype(np.float32)


def sound_file(samples: np.ndarray, rate: int = RATE, kind: str = "WAV") -> bytes:
    """Returns a waveform, (n,) or (n, channels), as a file."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind)
    return stream.getvalue()


def tone(number: int) -> bytes:
    """Returns a tone as a WAV file."""
    return sound_file(wave(number))


def sound_entry(number: int) -> Entry:
    """Returns a question about one tone, which stands for a colour."""
    return Entry(f"s{number:03d}", conversation((f"<sound>\n{QUESTION}", colour_of(number))), sounds=(tone(number),))


def both_entry(number: int) -> Entry:
    """Returns a question about a tone and a picture, in this order."""
    turns = conversation((f"<sound>\n<image>\n{QUESTION}", colour_of(number)))
    return Entry(f"b{number:03d}", turns, (picture(number),), (tone(number),))


def tiny_whisper(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes a random Whisper that hears one second at a time, and returns its folder."""
    sizes: dict[str, Any] = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": MELS,
        "max_source_positions": FRAMES, "max_target_positions": 8, "vocab_size": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "init_std": 0.3,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        WhisperModel(WhisperConfig(**{**sizes, **changes})).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=MELS, chunk_length=1).save_pretrained(folder)
    return folder


def hearing_model(
    world: TinyWorld,
    folder: Path,
    init_from: Path | None = None,
    plan: ExtensionPlan | None = None,
    parts: tuple[str, ...] | None = None,
    **options: Any,
) -> MoExtend:
    """Returns a model that sees and hears, built and in evaluation mode; `options` are those of `Hearing`."""
    model = MoExtend(
        encoder=VisionEncoder(path=str(world.encoder)),
        projector=Projector(kind="mlp2x_gelu"),
        language=MoELanguageModel(base=str(world.base)),
        hearing=Hearing(path=str(folder), **{"tokens": TOKENS, "depth": 1, **options}),
        init_from=str(init_from) if init_from else None,
    )
    model.extension_plan = plan
    model.train_plan = None if parts is None else TrainPlan(parts)
    model.configure_model()
    return model.eval()


def sample_of(model: MoExtend, entry: Entry, generation: bool = False) -> Sample:
    """Encodes an entry as the data does."""
    spec = model.sample_spec()
    encoder, see, hear = ConversationEncoder(spec), PixelTransform(spec), SoundTransform(spec)
    values = [turn["value"] for turn in entry.conversations]
    pixels = [see(decode_image(data, "x")) for data in entry.images]
    encode = encoder.encode_prompt if generation else encoder.encode
    sample = encode(entry.key, (Turn(*values[:2]),), pixels, [entry.key] * len(pixels))
    return with_sounds(sample, spec, [hear(data, "x") for data in entry.sounds], [f"{entry.key}~"] * len(entry.sounds))


def hearing_batch(model: MoExtend, entries: list[Entry], generation: bool = False) -> Batch:
    """Returns a batch of entries."""
    samples = [sample_of(model, entry, generation) for entry in entries]
    return (collate_generation if generation else collate_training)(samples, 0)


assert len(PITCHES) == len(COLOURS)
