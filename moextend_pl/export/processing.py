"""What an exported model reads: pictures and messages, encoded exactly as the data was when it learned.

Shapes: B prompts, S sequence, I images, H = W side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image

from moextend_pl.contracts import Sample, SampleSpec, UserError
from moextend_pl.inference.pictures import open_picture
from moextend_pl.samples.collate import numbered_tiles, pad
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.messages import Question, read_messages
from moextend_pl.samples.pixels import PixelTransform, to_rgb
from moextend_pl.samples.prompt import prompt_sample
from moextend_pl.samples.templates import apply_template, messages_of
from moextend_pl.samples.turns import IMAGE_MARK

NOT_PIXELS = ("tokenizer", "image_token_id", "tokens_per_image", "packing_obstacle", "context")


class MoExtendImageProcessor(BaseImageProcessor):
    """Turns pictures into pixel values.

    Args:
        pixels: What `SampleSpec` says of pictures, by its names.
        kwargs: What every image processor of transformers has.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - as transformers declares it

    def __init__(self, pixels: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pixels = pixels or {}

    def spec(self, tokenizer: Any = None, image_token_id: int = 0, tokens_per_image: int = 0) -> SampleSpec:
        """Returns what the model asks of its data."""
        facts: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.pixels.items()
        }
        return SampleSpec(tokenizer, image_token_id, tokens_per_image, **facts)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """Returns `pixel_values` (I, 3, H, W); a picture that is cut is several images.

        Args:
            images: One picture or a list: PIL image, array, tensor, path, `https` or `data:` address.
            return_tensors: As elsewhere in transformers.
        """
        transform = PixelTransform(self.spec())
        values = [transform(to_rgb(_picture(image))) for image in _flat(images)]
        joined = torch.cat(values) if transform.tiling.most else torch.stack(values)
        return BatchFeature({"pixel_values": joined}, tensor_type=return_tensors)

    def squares(self, images: list[Any]) -> Iterator[int]:
        """Yields how many squares each picture becomes."""
        transform = PixelTransform(self.spec())
        yield from (transform.squares(_picture(image)) for image in images)


class MoExtendProcessor(ProcessorMixin):
    """Turns messages or texts with pictures into what the model takes.

    Args:
        image_processor: For pictures.
        tokenizer: For texts.
        chat_template: Taken from the tokenizer where none is given.
        image_token_id: Id that stands on every place that an image feature fills.
        tokens_per_image: Number of such places of one image.
        context: Longest sequence of the model, in positions; None if it says none.
        kwargs: What every processor of transformers has.
    """

    def __init__(
        self,
        image_processor: MoExtendImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        image_token_id: int = 0,
        tokens_per_image: int = 0,
        context: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_token, self.image_token_id, self.tokens_per_image = IMAGE_MARK, image_token_id, tokens_per_image
        self.context = context
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template, **kwargs)
        tokenizer.chat_template = self.chat_template
        self._encoder: ConversationEncoder | None = None

    def encoder(self) -> ConversationEncoder:
        """Returns what encoded the data."""
        if self._encoder is None:
            spec = self.image_processor.spec(self.tokenizer, self.image_token_id, self.tokens_per_image)
            self._encoder = ConversationEncoder(spec)
        return self._encoder

    def __call__(
        self, images: Any = None, text: Any = None, return_tensors: str | None = None, **options: Any
    ) -> BatchFeature:
        """Encodes texts as a chat template made them, in which `<image>` stands for each picture.

        Args:
            images: Pictures in the order of their marks.
            text: One text or several.
            return_tensors: `pt` for tensors; several texts are then padded on the left.
            options: Of the tokenizer; they change nothing, since control tokens stand in the texts already.
        """
        texts, pictures = _flat(text), _flat(images) if images is not None else []
        marks = sum(each.count(IMAGE_MARK) for each in texts)
        if marks != len(pictures):
            raise UserError(f"Expected one picture for each `{IMAGE_MARK}`, got {len(pictures)} for {marks}.")
        pixels = self.image_processor(pictures)["pixel_values"] if pictures else torch.zeros(0)
        squares = self.image_processor.squares(pictures)
        tiles = [tuple(islice(squares, each.count(IMAGE_MARK))) for each in texts]
        encoded = [self.encoder().encode_text(each, some) for each, some in zip(texts, tiles, strict=True)]
        rows = [(each.ids, each.tiles) for each in encoded]
        return self._features(rows, pixels, return_tensors)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Any = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Any:
        """Turns messages into text, or into what the model takes.

        Control tokens that stand in messages stay text, as in training; a text can therefore not say everything that
        ids say, and `tokenize=True` is the way to ask.

        Args:
            conversation: Messages as `samples.messages` reads them, a question last, or a list of such lists.
            chat_template: Only the processor's own.
            tools: None.
            add_generation_prompt: Whether an answer is to follow; it always is where `tokenize` is set.
            tokenize: Whether to encode.
            return_dict: Whether all inputs are wanted or ids alone.
            return_tensors: `pt` for tensors.
            options: Others of transformers, of which there are none here.

        Raises:
            UserError: If a message cannot be taken.
        """
        if chat_template not in (None, self.chat_template):
            raise UserError("Expected the processor's own chat template, got another. Set `processor.chat_template`.")
        if tools:
            raise UserError("Expected no `tools`, got some: the model was trained without. Leave them out.")
        is_one = not conversation or isinstance(conversation[0], Mapping)
        questions = [read_messages(chat) for chat in ([conversation] if is_one else conversation)]
        if not tokenize:
            said = [messages_of(question.turns)[:-1] for question in questions]
            texts = apply_template(self.tokenizer, said, prompt=add_generation_prompt)
            return texts[0] if is_one else texts
        samples = [self._sample(question) for question in questions]
        pixels = torch.cat([sample.pixel_values for sample in samples])
        rows = [(sample.input_ids, sample.tiles) for sample in samples]
        inputs = self._features(rows, pixels, return_tensors, is_one)
        return inputs if return_dict else inputs["input_ids"]

    def _sample(self, question: Question) -> Sample:
        sample = prompt_sample(self.encoder(), question, [open_picture(picture) for picture in question.pictures])
        if self.context is not None and len(sample.input_ids) >= self.context:
            raise UserError(
                f"Expected a conversation of fewer positions than the model's context, {self.context}, got "
                f"{len(sample.input_ids)}, pictures included. Ask less at once: a shorter text, fewer pictures, or "
                "fewer earlier turns."
            )
        return sample

    def _features(
        self,
        rows: list[tuple[Tensor, Tensor | None]],
        pixels: Tensor,
        return_tensors: str | None,
        is_one: bool = False,
    ) -> BatchFeature:
        ids = [row for row, _ in rows]
        data: dict[str, Any] = {"input_ids": ids, "attention_mask": [torch.ones_like(row) for row in ids]}
        tiles = [each for _, each in rows if each is not None]
        if tiles and pixels.numel():
            data["tiles"] = numbered_tiles(tiles)
        if return_tensors is not None:
            fills = {"input_ids": self.encoder().pad_id}
            data = {name: pad(value, fills.get(name, 0), left=True) for name, value in data.items()}
        elif is_one:
            data = {name: value[0] for name, value in data.items()}
        if return_tensors is None:
            data = {name: _lists(value) for name, value in data.items()}
        if pixels.numel():
            data["pixel_values"] = pixels
        return BatchFeature(data, tensor_type=return_tensors)


def _lists(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else [row.tolist() for row in value]


def _flat(given: Any) -> list[Any]:
    """Returns all that a value or a list of values or lists holds."""
    return [item for each in given for item in _flat(each)] if isinstance(given, list | tuple) else [given]


def _picture(given: Any) -> Image.Image:
    """Opens a picture, or makes one of an array or a tensor."""
    picture: Image.Image = open_picture(given) if isinstance(given, Image.Image | str | Path) else to_pil_image(given)
    return picture
