"""An exported model: one transformers model of tower, projector and extended language model.

Shapes: B batch, S sequence, I images, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from moextend_pl.contracts import ExtensionPlan, UpcycleSpec
from moextend_pl.export.configuration import MoExtendConfig
from moextend_pl.export.seeing import ImageEncoder, ImageProjector, keep_buffers
from moextend_pl.models.cross_attention.gated_attention import attach
from moextend_pl.models.cross_attention.sight import Sight
from moextend_pl.models.fusion import scatter_features, standing_features
from moextend_pl.moe.extension.growth import extensions, grow
from moextend_pl.moe.extension.reach import OneAtATime, Reach, check_task, reachable
from moextend_pl.moe.upcycle import upcycle


class MoExtendForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Answers questions about images; texts without an image are the base's business alone where routing is masked.

    Which tokens may reach new experts, or look at images, is kept in the model from a prompt to the end of its answer.
    A model answers one call at a time, of any number of prompts; calls from other threads wait.

    Args:
        config: As it was exported.
    """

    config_class = MoExtendConfig
    config: MoExtendConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - as transformers declares it
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MoExtendConfig) -> None:
        super().__init__(config)
        self.encoder, self.projector = ImageEncoder(config.encoder), ImageProjector(config.projector)
        self.language_model: Any = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        spec = UpcycleSpec.from_dict(config.upcycle)
        if spec is not None:
            upcycle(self.language_model, spec)
        self.image_token_id = int(config.image_token_id or 0)
        self.turn, self.sight = OneAtATime(), Sight()
        if looking := config.projector.get("cross_attention"):
            self.projector.gated = attach(self.language_model, looking, self.sight)
        self.extensions: list[tuple[ExtensionPlan, Reach]] = []
        for plan in map(ExtensionPlan.from_dict, config.plans):
            self.extensions.append((plan, Reach()))
            grow(self.language_model, *self.extensions[-1])
        for part in (self.encoder, *extensions(self.language_model)):
            keep_buffers(part)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embeddings of the language model."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        """Returns the head of the language model."""
        head: nn.Module = self.language_model.get_output_embeddings()
        return head

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Encodes (I, 3, H, W) normalised images into (I, P, D) embeddings."""
        embedded: Tensor = self.projector(self.encoder(pixel_values))
        return embedded

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        tiles: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Embeds (B, S) ids, image features on their placeholders, and declares which tokens reach new experts.

        Args:
            input_ids: With the placeholders of each image.
            pixel_values: (I, 3, H, W), in the order of the placeholders; None without images.
            tiles: (B, S), as of `forward`.
            attention_mask: (B, S), as of `forward`.

        Raises:
            ValueError: If placeholders and images are not of the same number, or the task is not the model's.
        """
        is_image_BS = input_ids.eq(self.image_token_id) if tiles is None else tiles > 0
        has_image = bool(is_image_BS.any())
        check_task([plan for plan, _ in self.extensions], self.config.task, has_image)
        for plan, reach in self.extensions:
            tasks = [self.config.task] * len(input_ids)
            reach.set(reachable(plan.routing, plan.task, is_image_BS, tasks))
        self._look(input_ids, pixel_values, tiles if has_image else None, attention_mask)
        placed_BS = input_ids.eq(self.image_token_id)
        embeddings_BSD: Tensor = self.get_input_embeddings()(input_ids.masked_fill(placed_BS, 0))
        if not has_image and (pixel_values is None or not len(pixel_values)):
            return embeddings_BSD
        if pixel_values is None:
            raise ValueError("Expected `pixel_values` for the image placeholders in `input_ids`, got none.")
        features_IPD, places_T = self.get_image_features(pixel_values), placed_BS.flatten().nonzero().flatten()
        if tiles is not None:
            self.sight.show(features_IPD, tiles, self._tags())
            if not self.config.projector["thumbnail"]:
                return embeddings_BSD
            features_IPD = standing_features(features_IPD, tiles, places_T)
        return scatter_features(embeddings_BSD, features_IPD, places_T)

    def _look(self, ids_BS: Tensor, pixels: Tensor | None, tiles_BS: Tensor | None, mask_BS: Tensor | None) -> None:
        """Declares what tokens look at.

        Raises:
            ValueError: If the model looks at images and is not told what stands for them, or the other way round.
        """
        looks, images = bool(self.config.projector.get("cross_attention")), 0 if pixels is None else len(pixels)
        told = 0 if tiles_BS is None else int(tiles_BS.max())
        if told != images * looks:
            raise ValueError(f"Expected `tiles` of {images * looks} images, as the processor makes it, got {told}.")
        batch: Any = {"input_ids": ids_BS, "image_keys": range(told)}
        batch["attention_mask"] = torch.ones_like(ids_BS) if mask_BS is None else mask_BS
        if tiles_BS is not None:
            batch["tiles"] = tiles_BS
        self.sight.open(batch, self.image_token_id)

    def _tags(self) -> tuple[Tensor, Tensor] | None:
        """Returns embedded tags, as `Sight.show` takes them."""
        if not self.config.projector["tags"]:
            return None
        ids = torch.tensor(self.config.projector["tags"], device=self.device)
        return self.get_input_embeddings()(ids.clamp(min=0)), ids >= 0

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        tiles: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Predicts the next token.

        Args:
            input_ids: (B, S); with a filled cache, what comes after it, of the same sequences.
            pixel_values: (I, 3, H, W) of the images in `input_ids`.
            attention_mask: (B, S), 1 on real tokens.
            tiles: (B, S), which image each token stands for, counted from 1 over all rows, else 0; of models whose
                tokens look at images.
            labels: (B, S), -100 where nothing is learned.
            kwargs: Whatever the base language model takes.

        Returns:
            The output of the base language model, with (B, S, V) logits.

        Raises:
            ValueError: If no ids are given: without them nobody knows where images are.
        """
        if input_ids is None:
            raise ValueError("Expected `input_ids`, which say where images are, got none.")
        cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
        with self.turn:
            if cache is not None and cache.get_seq_length() > 0:
                embeddings_BSD = self.get_input_embeddings()(input_ids)
            else:
                embeddings_BSD = self.embed(input_ids, pixel_values, tiles, attention_mask)
            return self.language_model(
                inputs_embeds=embeddings_BSD, attention_mask=attention_mask, labels=labels, **kwargs
            )

    def _options(self, generation_config: Any, mask_BS: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """Returns options of the base's `generate`, under which answers end where the model's context ends.

        Raises:
            ValueError: If a prompt leaves no room.
        """
        self.language_model.generation_config = self.generation_config
        config = self.generation_config if generation_config is None else copy.copy(generation_config)
        longest, context = options.get("max_new_tokens", config.max_new_tokens), self.config.context
        if context is not None:
            room = context - int(mask_BS.sum(dim=1).max())
            if room < 1:
                raise ValueError(f"Expected prompts of less than {context} positions, the model's context; ask less.")
            longest = None if longest is None else min(longest, context - int(mask_BS.sum(dim=1).min()))
        if generation_config is not None:
            config.max_new_tokens = longest
            options = {**options, "generation_config": config}
            options.pop("max_new_tokens", None)
        elif longest is not None:
            options = {**options, "max_new_tokens": longest}
        return {**options, "attention_mask": mask_BS}

    def _within_context(self, answers_BS: Tensor, mask_BS: Tensor, options: dict[str, Any]) -> Tensor:
        """Returns answers that end with the context of their own prompt, also beside shorter prompts."""
        if self.config.context is None:
            return answers_BS
        config = options.get("generation_config", self.generation_config)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        known = (options.get("pad_token_id"), config.pad_token_id, *ends, 0)
        rooms_B = (self.config.context - mask_BS.sum(dim=1)).to(answers_BS.device)
        places_S = torch.arange(answers_BS.shape[1], device=answers_BS.device)
        beyond_BS = places_S >= rooms_B.repeat_interleave(len(answers_BS) // len(mask_BS))[:, None]
        return answers_BS.masked_fill(beyond_BS, next(token for token in known if token is not None))

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        tiles: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates as the base language model does, from prompts with images.

        Args:
            inputs: Same as `input_ids`.
            generation_config: As for every model of transformers.
            input_ids: (B, S) prompts, padded on the left.
            pixel_values: (I, 3, H, W) of their images.
            attention_mask: (B, S); by default all tokens are real.
            tiles: (B, S), as of `forward`.
            kwargs: Further options of generation.

        Returns:
            What transformers returns: prompts with what was generated behind them.

        Raises:
            ValueError: If no ids are given, or a prompt leaves no room for an answer.
        """
        ids_BS = inputs if input_ids is None else input_ids
        if ids_BS is None:
            raise ValueError("Expected `input_ids` of at least one prompt, got none.")
        mask_BS = torch.ones_like(ids_BS) if attention_mask is None else attention_mask
        options = self._options(generation_config, mask_BS, kwargs)
        with self.turn:
            try:
                embeddings_BSD = self.embed(ids_BS, pixel_values, tiles, mask_BS)
                made = self.language_model.generate(inputs_embeds=embeddings_BSD, **options)
            finally:
                self.sight.close()
                for _, reach in self.extensions:
                    reach.set(None)
        answers = self._within_context(made if isinstance(made, Tensor) else made.sequences, mask_BS, options)
        prompts = ids_BS.to(answers.device).repeat_interleave(len(answers) // len(ids_BS), dim=0)
        whole = torch.cat([prompts, answers], dim=1)
        if isinstance(made, Tensor):
            return whole
        made.sequences = whole
        return made
