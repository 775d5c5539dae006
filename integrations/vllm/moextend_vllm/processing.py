"""What vLLM asks of a multimodal model before it runs: how many places pictures take, and their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)
from vllm.renderers import TokenizeParams

from moextend_pl.samples.turns import IMAGE_MARK

PLACE = 0
"""Id on the places of a picture once they are reserved: any of the vocabulary, for vLLM knows them by number."""


class PictureFacts(BaseProcessingInfo):
    """How many pictures a question may have, and how many places each takes."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Returns that any number of pictures may be asked about."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Returns the places of a picture, which all pictures have."""
        return {"image": self.tokens_per_image()}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """Returns that nothing of the processor can be changed."""
        return {}

    def get_default_tok_params(self) -> TokenizeParams:
        """Returns how texts are tokenised: control tokens stand in them already."""
        return TokenizeParams(max_total_tokens=self.ctx.model_config.max_model_len, add_special_tokens=False)

    def tokens_per_image(self) -> int:
        """Returns the places of a picture."""
        processor: Any = self.get_hf_processor()
        if processor.image_processor.spec().tiles:
            raise ValueError(
                "Expected a model whose pictures stay whole, got one that cuts them into tiles. Ask it by `serve`."
            )
        return int(processor.tokens_per_image)


class LargestQuestion(BaseDummyInputsBuilder[PictureFacts]):
    """Makes the question by which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Returns marks for pictures."""
        return IMAGE_MARK * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        """Returns pictures of the size that the tower takes."""
        processor: Any = self.info.get_hf_processor()
        side = processor.image_processor.spec().image_size
        images = self._get_dummy_images(
            width=side, height=side, num_images=mm_counts.get("image", 0), overrides=mm_options.get("image")
        )
        return {"image": images}


class PictureProcessor(BaseMultiModalProcessor[PictureFacts]):
    """Turns pictures into pixel values as in training, and reserves their places."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        processor: Any = self.info.get_hf_processor()
        features: BatchFeature = processor.image_processor(hf_data["images"], return_tensors="pt")
        return features

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        config: Any = self.info.get_hf_config()
        places = [PLACE] * self.info.tokens_per_image()
        return [PromptReplacement(modality="image", target=[config.image_token_id], replacement=places)]
