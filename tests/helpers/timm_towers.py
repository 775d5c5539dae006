"""A timm model as timm publishes its models."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.models import save_for_hf


def published(folder: Path) -> torch.nn.Module:
    """Writes a small timm model as timm publishes models, with pictures of its own kind."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64)
    facts = {"input_size": (3, 64, 64), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "crop_pct": 0.8}
    model.pretrained_cfg = {**model.pretrained_cfg, **facts, "interpolation": "bilinear", "crop_mode": "center"}
    save_for_hf(model, folder, model_args={"img_size": 64}, safe_serialization=True)
    return model
