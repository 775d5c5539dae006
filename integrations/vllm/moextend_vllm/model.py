"""An exported model in vLLM: its backend for models of transformers, which reads flags off positions.

Shapes: T tokens of a pass, of many requests; I images, P places of one image, H = W side in pixels, D width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.base import Base
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from moextend_pl.export.configuration import MoExtendConfig
from moextend_pl.samples.turns import IMAGE_MARK
from moextend_vllm.network import MoExtendModel, file_names
from moextend_vllm.places import marked_places, read_places
from moextend_vllm.processing import LargestQuestion, PictureFacts, PictureProcessor


@MULTIMODAL_REGISTRY.register_processor(PictureProcessor, info=PictureFacts, dummy_inputs=LargestQuestion)
class MoExtendForVllm(TransformersMultiModalForCausalLM):
    """Serves an exported model.

    Args:
        vllm_config: All options of the engine.
        prefix: Where the model stands in a larger one.
    """

    model: MoExtendModel

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        AutoModel.register(MoExtendConfig, MoExtendModel, exist_ok=True)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:  # noqa: ARG003 - vLLM gives both
        """Returns what stands in a text where a picture belongs."""
        return IMAGE_MARK if modality == "image" else None

    def _decorate_for_torch_compile(self) -> None:
        # Nothing is compiled: masks are made anew for each pass.
        return

    def _create_hf_to_vllm_mapper(self) -> None:
        # Names in the folder are those in memory, so that nothing of transformers' conversions is to be undone.
        # Patterns, for they are applied before the names of what vLLM computes as one.
        renamed = {re.compile(f"^{re.escape(old)}"): new for old, new in file_names(self.model).items()}
        self.hf_to_vllm_mapper = WeightsMapper(orig_to_new_regex=renamed)

    def init_parameters(self, module: Any, dtype: torch.dtype | None = None) -> None:
        """Makes room for parameters, and for buffers that the folder holds."""
        super().init_parameters(module, dtype)
        for each in module.modules():
            for name, buffer in list(each.named_buffers(recurse=False)):
                if buffer.is_meta:
                    setattr(each, name, torch.empty_like(buffer, device=self.device_config.device))

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Returns (3, S) positions of a prompt that carry flags, and what is added to those of its answer."""
        is_image_S = torch.zeros(len(input_tokens), dtype=torch.bool)
        for feature in mm_features:
            place = feature.mm_position
            is_image_S[place.offset : place.offset + place.length] = True
        plans = [plan for plan, _ in self.model.extensions]
        return marked_places(plans, self.config.task, is_image_S)

    def embed_multimodal(self, **inputs: Any) -> Sequence[Tensor]:
        """Encodes pixel values (I, 3, H, W) into (P, D) embeddings of each image."""
        pixels = inputs.get("pixel_values")
        return [] if pixels is None else list(self.model.get_image_features(pixels))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Returns (T, D) hidden states.

        Args:
            input_ids: (T,), or None where embeddings are given.
            positions: (3, T), with flags.
            intermediate_tensors: None.
            inputs_embeds: (T, D).
        """
        places_T, masks_T = read_places(positions[0], len(self.model.extensions))
        if get_forward_context().attn_metadata is None:  # memory is measured: by the passes that take most
            masks_T = [torch.ones_like(mask_T) for mask_T in masks_T]
        self.model.declare(masks_T)
        return Base.forward(self, input_ids, places_T, intermediate_tensors, inputs_embeds)
