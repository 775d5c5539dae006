"""A published timm model as a vision tower: its weights, and the pictures that it learned from."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moextend_pl.contracts import UserError
from moextend_pl.extend.own_data import state_of

log = logging.getLogger(__name__)

FACTS, WEIGHTS = "config.json", "model.safetensors"
SQUARE_BY = {"center": "crop", "squash": "squash"}


def timm_config(folder: Path) -> dict[str, Any]:
    """Returns the configuration of a folder as timm publishes its models; empty for any other folder."""
    path = folder / FACTS
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}  # told by who reads it
    return dict(config) if "architecture" in config and "model_type" not in config else {}


def save_timm_tower(folder: Path, config: Mapping[str, Any], out: Path) -> Path:
    """Writes a timm model as a tower that stages read.

    Args:
        folder: As timm publishes it: `config.json` and `model.safetensors`.
        config: What the former says.
        out: Folder below which the tower is written.

    Returns:
        The tower's folder.

    Raises:
        UserError: If the weights are missing, or timm cannot build the model up to its last feature level but one.
    """
    from moextend_pl.models.encoder import TIMM, VisionEncoder
    from moextend_pl.models.tower import FeatureSpec, make_timm

    # Another model may lie in a folder of the same name.
    place = out / f"{folder.name}-{state_of(folder / FACTS, folder / WEIGHTS)[:8]}"
    if (place / "encoder.json").is_file():
        return place
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"Expected the weights of a timm model as {WEIGHTS} in {folder}, found none. Fetch it anew.")
    arguments = dict(config.get("model_args") or {})
    facts = pictures_of(config.get("pretrained_cfg") or {})
    tower = VisionEncoder(
        name=f"{TIMM}{config['architecture']}",
        image_size=facts.pop("image_size"),
        tower_args=arguments,
        features=FeatureSpec(resize=facts.pop("resize"), resample=facts.pop("resample")),
    )
    tower.configure_model()
    published = make_timm(f"local-dir:{folder}", int(tower.config["layer"]), {**arguments, "pretrained": True})
    tower.tower.load_state_dict(published.state_dict())
    tower.config.update(facts)
    tower.save_pretrained(place)
    log.info("%s holds the timm model %s up to its last feature level but one", place, config["architecture"])
    return place


def pictures_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns side, shape, filter and statistics of the pictures of a timm model, by our names.

    Args:
        facts: Its `pretrained_cfg`; defaults are timm's own.

    Raises:
        UserError: If pictures become square in a way that there is none of here.
    """
    side = int((facts.get("input_size") or (3, 224, 224))[-1])
    mode = facts.get("crop_mode") or "center"
    if mode not in SQUARE_BY:
        raise UserError(
            f"Expected `crop_mode` of a timm model out of {', '.join(SQUARE_BY)}, got {mode!r}. Name another tower."
        )
    larger = math.floor(side / float(facts.get("crop_pct") or 0.875))
    return {
        "image_size": side,
        "resize": SQUARE_BY[mode] if larger <= side else f"{SQUARE_BY[mode]}:{larger}",
        "resample": str(facts.get("interpolation") or "bicubic"),
        "image_mean": list(facts.get("mean") or (0.485, 0.456, 0.406)),
        "image_std": list(facts.get("std") or (0.229, 0.224, 0.225)),
    }
