"""An exported model as vLLM's backend for models of transformers takes one: tower, projector and decoder, no head.

Shapes: B batch, S sequence, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from moextend_pl.export.configuration import MoExtendConfig
from moextend_pl.export.modeling import MoExtendForConditionalGeneration


class MoExtendModel(MoExtendForConditionalGeneration):
    """Computes hidden states of embeddings; which tokens reach new experts was declared before.

    Args:
        config: As it was exported.
    """

    base_model_prefix = ""
    language_model: Any

    def __init__(self, config: MoExtendConfig) -> None:
        super().__init__(config)
        whole: Any = self.language_model
        self.decoder_name: str = whole.base_model_prefix
        self.language_model = getattr(whole, self.decoder_name)

    def get_decoder(self, modality: str | None = None) -> nn.Module:
        """Returns the decoder of the language model."""
        decoder: nn.Module = self.language_model
        return decoder

    def get_output_embeddings(self) -> None:
        """Returns nothing: vLLM has the head."""
        return

    def declare(self, masks_T: Sequence[Tensor]) -> None:
        """Declares which tokens of the next pass may reach the new experts of each extension.

        Args:
            masks_T: (T,) booleans, one tensor for each extension.
        """
        for (_, reach), mask_T in zip(self.extensions, masks_T, strict=True):
            reach.set(mask_T[None])

    def forward(self, **inputs: Any) -> Any:
        """Returns what the decoder of the base returns."""
        return self.language_model(**inputs)


def file_names(model: MoExtendModel) -> dict[str, str]:
    """Returns how beginnings of names in an exported folder begin in vLLM's model, which has ours as `model`."""
    return {
        f"language_model.{model.decoder_name}.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "encoder.": "model.encoder.",
        "projector.": "model.projector.",
    }
