"""What a vision tower says of its pictures in `preprocessor_config.json`, read as transformers' own processors read it.

Followed are `do_resize` sizes, cropping, padding of LLaVA's kind, `resample`, `do_rescale` with its factor, and
`do_normalize` with mean and deviation; `do_convert_rgb` always holds. What else a file says is told by `unheeded`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from moextend_pl.contracts import UserError
from moextend_pl.samples.squares import CROP, PAD, RESAMPLE, SQUASH

log = logging.getLogger(__name__)

PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
KIND, OLD_KIND = "image_processor_type", "feature_extractor_type"
FOLLOWED = (
    *("do_resize", "size", "do_center_crop", "crop_size", "resample", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)
# Of files and programs, or true of every picture here.
NO_MATTER = (
    *(KIND, OLD_KIND, "processor_class", "auto_map", "transformers_version", "backend", "model_input_names", "device"),
    *("do_convert_rgb", "default_to_square", "data_format", "input_data_format", "return_tensors"),
    *("disable_grouping", "use_square_size", "patch_size", "do_reduce_labels", "size_divisor"),
)
SIZES: tuple[set[str], ...] = ({"height", "width"}, {"shortest_edge"}, set())
LEVELS = 255

Statistics = dict[str, tuple[float, float, float]]


def read_preprocessor(*folders: str) -> dict[str, Any]:
    """Returns what the first folder with the file says, and what its kind of processor takes where it says nothing.

    Args:
        folders: Of a tower; none of them need have the file.

    Raises:
        UserError: If the file is damaged.
    """
    for path in (Path(folder) / file for folder in folders for file in (PREPROCESSOR_FILE, PROCESSOR_FILE)):
        if path.is_file():
            try:
                told = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}: expected facts about pictures in JSON, got {error}. Copy it again."
                ) from error
            if path.name == PROCESSOR_FILE:  # in which newer versions keep it beside the tokenizer's
                told = dict(told.get("image_processor") or {})
            return {**_usual(told), **told}
    return {}


def _usual(told: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults of a kind of processor; nothing of one that transformers does not know."""
    name = str(told.get(KIND) or told.get(OLD_KIND) or "")
    kind = get_image_processor_class_from_name(name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor"))
    known = {name: getattr(kind, name, None) for name in FOLLOWED}
    return {name: value for name, value in known.items() if value is not None}


def own_pictures(folder: str, side: int) -> dict[str, Any]:
    """Returns `resize` and `resample` as a transformers tower says them, and tells what else it says.

    Args:
        folder: Of the tower.
        side: Of the square that pictures become, in pixels.
    """
    facts = read_preprocessor(folder)
    if others := unheeded(facts):
        log.warning("%s says of its pictures what is not followed: %s", folder, ", ".join(others))
    return {"resize": own_resize(facts, side), "resample": own_resample(facts)}


def own_resize(facts: Mapping[str, Any], side: int) -> str:
    """Returns how the data of a transformers tower were made square.

    Args:
        facts: Of its file; without a word about shapes pictures are squashed.
        side: Of the square in pixels.
    """
    if facts.get("do_pad") and _is_llava(facts):
        return PAD
    size, crop = facts.get("size"), facts.get("crop_size")
    shorter = size.get("shortest_edge", size.get("height")) if isinstance(size, Mapping) else size
    crop = crop.get("height") if isinstance(crop, Mapping) else crop
    if not facts.get("do_center_crop") or not isinstance(shorter, int) or not isinstance(crop, int):
        return SQUASH
    how = SQUASH if isinstance(size, Mapping) and "height" in size else CROP
    # Of a square of another side the same part is seen.
    return how if shorter <= crop else f"{how}:{round(side * shorter / crop)}"


def _is_llava(facts: Mapping[str, Any]) -> bool:
    return str(facts.get(KIND, "")).startswith("LlavaImageProcessor")


def own_resample(facts: Mapping[str, Any]) -> str | None:
    """Returns the filter by which pictures change their size, as `samples.squares` names it; None if nothing says.

    Raises:
        UserError: If there is no such filter.
    """
    number = facts.get("resample")
    if number is not None and number not in range(len(RESAMPLE)):
        raise UserError(
            f"Expected `resample` of {PREPROCESSOR_FILE} as a number of Pillow's, from 0 to {len(RESAMPLE) - 1}, got "
            f"{number!r}. Take the file from where the tower's weights come from."
        )
    return None if number is None else RESAMPLE[number]


def own_statistics(facts: Mapping[str, Any], origin: str) -> Statistics:
    """Returns `image_mean` and `image_std` by which `(x / 255 - mean) / std` are the values that a tower learned with.

    Args:
        facts: Of its file.
        origin: Where they are looked for, for the error message.

    Raises:
        UserError: If they do not say.
    """
    factor = float(facts.get("rescale_factor") or 1 / LEVELS) if facts.get("do_rescale", True) else 1.0
    try:
        plain = {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3} if facts.get("do_normalize") is False else facts
        found = {name: [float(value) for value in plain[name]] for name in ("image_mean", "image_std")}
        scale = 1.0 if abs(factor * LEVELS - 1) < 1e-6 else factor * LEVELS  # as good as every file says
        return {name: (r / scale, g / scale, b / scale) for name, (r, g, b) in found.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"Expected `image_mean` and `image_std` in {origin}, got {error!r}. Take the file from where the tower's "
            "weights come from."
        ) from error


def unheeded(facts: Mapping[str, Any]) -> list[str]:
    """Returns what a file says of pictures and nothing here follows, as `name=value`."""
    size = facts.get("size")
    odd = isinstance(size, Mapping) and set(size) not in SIZES
    followed = {*FOLLOWED, *NO_MATTER, *(("do_pad",) if _is_llava(facts) else ())}
    others = {name: value for name, value in facts.items() if name not in followed and value and value != [0, 0, 0]}
    told = {**others, **({"size": size} if odd else {})}
    told |= {"do_resize": False} if facts.get("do_resize") is False else {}
    return [f"{name}={json.dumps(value, default=str)}" for name, value in told.items()]
