"""One question about one picture as a batch of prompts, encoded exactly as the data is."""

from __future__ import annotations

import hashlib

import torch
from PIL import Image

from moextend_pl.contracts import Batch, SampleSpec, UserError
from moextend_pl.samples.collate import collate_generation
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import PixelTransform, to_rgb
from moextend_pl.samples.turns import IMAGE_MARK, Turn


def prompt_batch(spec: SampleSpec, image: Image.Image | None, question: str, device: torch.device) -> Batch:
    """Returns a generation batch of one question, about a picture or none, without any image mark.

    Raises:
        UserError: If the question holds an image mark, which would ask for a picture that nobody gave.
    """
    if IMAGE_MARK in question:
        raise UserError(
            f"Expected a question without {IMAGE_MARK}, got {question!r}. Leave the mark out: the picture is put "
            "before the question."
        )
    pixels = [PixelTransform(spec)(to_rgb(image))] if image is not None else []
    text = f"{IMAGE_MARK}\n{question}" if pixels else question
    # Named by content, as in the data: features are kept by name.
    names = [hashlib.blake2b(values.numpy().tobytes(), digest_size=8).hexdigest() for values in pixels]
    sample = ConversationEncoder(spec).encode_prompt("prompt", (Turn(text, "?"),), pixels, names)
    batch = collate_generation([sample], 0)
    for name in ("input_ids", "attention_mask", "labels", "pixel_values"):
        batch[name] = batch[name].to(device)
    return batch
