"""A published checkpoint of any kind, made on demand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.published import WIDTH, clip_tensors, language_tensors, projector_tensors, random, write_published
from torch import Tensor


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    def make(name: str, suffix: str = ".safetensors") -> tuple[Path, dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        kind = "mistral" if "mistral" in name else "mixtral"
        experts = 0 if "dense" in name else 4
        if name.startswith("cumo"):
            tensors = clip_tensors(draw, experts, "model.vision_tower.vision_model.")
            tensors |= projector_tensors(draw, experts, "model.mm_projector.", 2)
            config = {"model_type": f"llava_{kind}", "scales": [1, 3], "balance_loss_coef": 0.1, "num_selected": 2}
        else:
            tensors = clip_tensors(draw, 0, "model.visual.vision_tower.vision_model.")
            tensors |= projector_tensors(draw, 0, "model.visual.mm_projector.", 1)
            config = {"model_type": "mixtral"}
        stock = language_tensors(kind, tmp_path / "stock")
        if name.startswith("moextend"):
            block = "model.layers.1.block_sparse_moe."
            stock[f"{block}gate_vision.weight"] = random(draw, 1, WIDTH)
            stock[f"{block}weight_scale.weight_scale.0.weight"] = random(draw, 8, 5)
            stock[f"{block}weight_scale.weight_scale.2.weight"] = random(draw, 5, 8)
            for w, shape in (("w1", (24, WIDTH)), ("w2", (WIDTH, 24)), ("w3", (24, WIDTH))):
                stock[f"{block}experts.4.{w}.weight"] = random(draw, *shape)
        config = {**json.loads((tmp_path / "stock" / "config.json").read_text()), **config}
        return write_published(tmp_path / "published", {**tensors, **stock}, config, suffix), {**tensors, **stock}

    return make
