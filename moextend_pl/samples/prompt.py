"""Questions as a batch of prompts, encoded exactly as the data is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from moextend_pl.contracts import Batch, Sample, SampleSpec
from moextend_pl.samples.collate import collate_generation
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.messages import Question, ask
from moextend_pl.samples.pixels import PixelTransform, content_name, to_rgb


def prompt_sample(encoder: ConversationEncoder, question: Question, images: Sequence[Image.Image]) -> Sample:
    """Encodes a question.

    Args:
        encoder: Of the model that is asked.
        question: The question.
        images: Its pictures, opened.
    """
    transform = PixelTransform(encoder.spec)
    pixels = [transform(to_rgb(image)) for image in images]
    # Named by content, as in the data: features are kept by name.
    names = [content_name(values.numpy().tobytes()) for values in pixels]
    return encoder.encode_prompt("prompt", question.turns, pixels, names)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Moves the tensors of a batch, in place, and returns it."""
    for name in ("input_ids", "attention_mask", "labels", "pixel_values"):
        batch[name] = batch[name].to(device)
    if "tiles" in batch:
        batch["tiles"] = batch["tiles"].to(device)
    if "sounds" in batch:
        batch["sounds"] = batch["sounds"].to(device)
    return batch


def prompt_batch(spec: SampleSpec, image: Image.Image | None, question: str, device: torch.device) -> Batch:
    """Returns a generation batch of one question, about a picture or none, without any image mark.

    Raises:
        UserError: As `messages.ask`.
    """
    images = [] if image is None else [image]
    encoder = ConversationEncoder(spec)
    sample = prompt_sample(encoder, ask(question, images), images)
    return to_device(collate_generation([sample], encoder.pad_id), device)
