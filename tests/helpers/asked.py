"""Models that are asked, extended by experts that matter, and pictures for them."""

from __future__ import annotations

import io
from collections import Counter

from helpers.tiny_world import TinyWorld, make_plan, perturb, picture
from PIL import Image

from moextend_pl.models.moextend import MoExtend


def extended(world: TinyWorld, routing: str = "masked") -> MoExtend:
    """Returns a model whose new experts in every layer differ from their sources."""
    model = world.model(make_plan((0, 1, 2), init="copy", routing=routing))
    perturb([p for part in ("new_experts", "new_routers") for p in model.language.parts()[part]])
    return model


def endless(world: TinyWorld) -> MoExtend:
    """Returns such a model whose answers have no end but the longest one, 8 tokens."""
    model = extended(world)
    model.language.model.generation_config.eos_token_id = None
    model.language.tokenizer.eos_token = None
    return model


def passes(model: MoExtend) -> Counter[str]:
    """Returns a count of the passes through the language model that are made from now on."""
    count: Counter[str] = Counter()
    model.language.model.register_forward_pre_hook(lambda *_: count.update(["all"]))
    return count


def shown(number: int) -> Image.Image:
    """Returns a picture of the tiny world."""
    return Image.open(io.BytesIO(picture(number)))
