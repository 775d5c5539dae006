"""The sense of hearing: a frozen encoder of sounds, and the connector to the language model.

Shapes: N sounds, F frames, C channels of the encoder, T tokens of a sound, D width of the language model.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from moextend_pl.contracts import Batch, SampleSpec, UserError
from moextend_pl.models.feature_cache import FeatureCache, encode_once
from moextend_pl.models.fusion import scatter_features
from moextend_pl.models.modalities.connector import JoinedFrames, QFormer, linear_maps
from moextend_pl.models.modalities.sound_encoder import check_folder, count_frames, make_encoder
from moextend_pl.models.model_folder import base_folder
from moextend_pl.moe.touch import touch
from moextend_pl.samples.sound.features import SoundTransform, own_window, read_extractor
from moextend_pl.samples.sound.waveform import check_packages
from moextend_pl.training.stage import StageModule, shapes_only


class Hearing(StageModule):
    """Turns each sound into T tokens among the words.

    Args:
        path: Folder of a transformers audio model with its `preprocessor_config.json`: Whisper (its encoder), AST,
            Wav2Vec2, HuBERT or WavLM; or its `org/name` of a hub.
        connector: `qformer`, or `linear` or `mlpNx_gelu` on joined frames.
        tokens: T; shorter sounds take as many, their end is silence.
        depth: Blocks of a `qformer`.
        seconds: Longest sound, for an encoder of waveforms; others say it themselves.

    Raises:
        UserError: If a library or a file is missing, or an option is not possible.
    """

    def __init__(
        self,
        path: str,
        connector: str = "qformer",
        tokens: int = 16,
        depth: int = 4,
        seconds: float | None = None,
    ) -> None:
        super().__init__()
        check_packages()
        self.maps = linear_maps(connector)
        self.path = base_folder(path)
        self.config = check_folder(self.path)
        for name, value in (("tokens", tokens), ("depth", depth)):
            if value < 1:
                raise UserError(f"Expected `hearing.{name}` of at least 1, got {value}.")
        self.connector_kind, self.tokens, self.depth, self.seconds = connector, tokens, depth, seconds
        self.window = self._window()

    def _window(self) -> float:
        """Returns the length of the longest sound in seconds."""
        own = own_window(read_extractor(self.path))
        if own is None and (self.seconds is None or not 0 < self.seconds < math.inf):
            raise UserError(
                f"Expected `hearing.seconds` > 0, the longest sound, for {self.config.model_type}, which reads "
                f"waveforms of any length, got {self.seconds}."
            )
        if own is not None and self.seconds not in (None, own):
            raise UserError(
                f"Expected no `hearing.seconds` for {self.config.model_type}, which always reads {own:g} seconds, got "
                f"{self.seconds:g}. Leave it out."
            )
        return own or float(self.seconds or 0)

    def rebuild_arguments(self) -> dict[str, Any]:
        """Returns the arguments that build it again."""
        options = {"tokens": self.tokens, "depth": self.depth, "seconds": self.seconds}
        return {"path": self.path, "connector": self.connector_kind, **options}

    def facts(self) -> dict[str, Any]:
        """Returns what `SampleSpec` says of sounds."""
        return {"sounds": self.path, "sound_seconds": self.window, "tokens_per_sound": self.tokens}

    @cached_property
    def frames(self) -> int:
        """F, frames of a sound; needs no built encoder."""
        spec = SampleSpec(None, 0, 0, 0, **self.facts())  # type: ignore[arg-type]
        silence = np.zeros(1, dtype=np.float32)
        return count_frames(self.path, SoundTransform(spec).of_wave(silence).shape)

    @property
    def channels(self) -> int:
        """C."""
        return int(self.config.hidden_size)

    def build(self) -> None:
        """Is not trained alone.

        Raises:
            UserError: Always.
        """
        raise UserError("Hearing is no model of its own; give it to MoExtend as `hearing`.")

    def build_for(self, width: int) -> None:
        """Builds encoder and connector.

        Args:
            width: D.
        """
        frames = self.frames  # also finds out that the files fit together
        if self.maps and self.tokens > frames:
            raise UserError(
                f"Expected `hearing.tokens` of at most {frames}, the frames of a sound, for connector "
                f"{self.connector_kind!r}, which joins them, got {self.tokens}. Lower it, or take `qformer`."
            )
        self.encoder: Any = make_encoder(self.path, with_weights=not shapes_only())
        self.connector: nn.Module = (
            JoinedFrames(frames, self.tokens, self.channels, width, self.maps)
            if self.maps
            else QFormer(self.tokens, self.channels, width, self.depth)
        )

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Returns `hearing`, what is new, and `sound_encoder`."""
        return {"hearing": list(self.connector.parameters()), "sound_encoder": list(self.encoder.parameters())}

    def sample_spec(self) -> SampleSpec:
        """Has no samples of its own.

        Raises:
            UserError: Always.
        """
        raise UserError("Hearing has no samples of its own; give it to MoExtend as `hearing`.")

    def train(self, mode: bool = True) -> Hearing:
        """Changes the mode of all but a frozen encoder, which drops and masks nothing."""
        super().train(mode)
        if encoder := getattr(self, "encoder", None):
            encoder.train(mode and any(parameter.requires_grad for parameter in encoder.parameters()))
        return self

    def encode(self, sounds: Tensor) -> Tensor:
        """Returns the frames of sounds, (N, F, C).

        Args:
            sounds: (N, ...) as the feature extractor made them.
        """
        floating = (parameter.dtype for parameter in self.encoder.parameters() if parameter.is_floating_point())
        frames_NFC: Tensor = self.encoder(sounds.to(next(floating))).last_hidden_state
        return frames_NFC

    def forward(self, features_NFC: Tensor) -> Tensor:
        """Returns the tokens of sounds, (N, T, D)."""
        tokens_NTD: Tensor = self.connector(features_NFC)
        return tokens_NTD

    def place(self, embeddings_BSD: Tensor, batch: Batch, cache: FeatureCache, keep: bool) -> Tensor:
        """Overwrites the placeholders of sounds with what was heard.

        Args:
            embeddings_BSD: Embedded ids.
            batch: With its host facts; where it has no sound, all parameters take part with a zero, so that no rank
                waits for their gradients.
            cache: What a frozen encoder made of sounds before.
            keep: Whether to keep it there.

        Returns:
            (B, S, D) embeddings.

        Raises:
            UserError: If the batch has not as many sounds as its text, or has tiles to look at.
        """
        encoder, places = list(self.encoder.parameters()), batch["known"].sounds
        assert places is not None
        if "tiles" in batch:
            raise UserError(
                "Expected pictures among the words for a model that hears, got `projector.cross_attention`, which was "
                "not tried with `hearing` yet. Leave one of the two out."
            )
        if len(places) and "sounds" not in batch:
            raise UserError(f"Expected the sounds of {len(places)} placeholders in the batch, got none. Add `sounds`.")
        zero = touch(encoder if len(places) else self.parameters())  # an encoder may have weights that nothing reads
        embeddings_BSD = embeddings_BSD if zero is None else embeddings_BSD + zero.to(embeddings_BSD.dtype)
        if not len(places):
            return embeddings_BSD
        if any(parameter.requires_grad for parameter in encoder):
            frames_NFC = self.encode(batch["sounds"])
        else:
            frames_NFC = encode_once(self.encode, batch["sounds"], batch["sound_keys"], cache, keep)
        return scatter_features(embeddings_BSD, self(frames_NFC), places, "sound")
