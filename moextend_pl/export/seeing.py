"""Tower and projector of an exported model: the computations of `VisionEncoder` and `Projector` without their training.

Shapes: I images, H = W side in pixels, P tokens of one image, C channels of the tower, D width of the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from moextend_pl.contracts import UpcycleSpec
from moextend_pl.models.fusion import dense_layers, merge_neighbours
from moextend_pl.models.multiscale import encode_scales
from moextend_pl.models.tower import BlockReader, make_timm, pooled_tokens, read_grid, vision_half
from moextend_pl.moe.dense_mlp import read_mlp
from moextend_pl.moe.upcycle import UpcycledMLP, upcycle


class ImageEncoder(nn.Module):
    """A vision tower that encodes images into P tokens each.

    Args:
        facts: As `MoExtendConfig.encoder` lists them.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__()
        self.facts = facts
        self.tower: Any = self._make_tower()
        spec = UpcycleSpec.from_dict(facts.get("upcycle"))
        if spec is not None:
            upcycle(self.tower, spec)
        self.reader = None
        if facts.get("config") is not None:
            self.reader = BlockReader(self.tower, facts["layer"], facts["reference"])

    def _make_tower(self) -> Any:
        if self.facts.get("config") is None:
            return make_timm(self.facts["name"], self.facts["layer"], self.facts["tower_args"])
        config = AutoConfig.for_model(**self.facts["config"])
        return vision_half(AutoModel.from_config(config, dtype=torch.get_default_dtype()))

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        """Encodes normalised images into (I, P, C) features, row by row.

        Always the same number at a time, as in the run: the last bit of a feature may depend on it.
        """
        together = 1 if self.training else int(self.facts["together"])
        if together == 1:
            return self._features(pixels_I3HW)
        parts = []
        for some_I3HW in pixels_I3HW.split(together):
            padded = some_I3HW.new_zeros(together, *some_I3HW.shape[1:])
            padded[: len(some_I3HW)] = some_I3HW
            parts.append(self._features(padded)[: len(some_I3HW)])
        return torch.cat(parts)

    def _features(self, pixels_I3HW: Tensor) -> Tensor:
        side = self.facts["grid_side"]
        grid_ICHW = encode_scales(
            lambda pixels: read_grid(self.tower, self.reader, pixels, side), pixels_I3HW, self.facts["scales"]
        )
        return pooled_tokens(grid_ICHW, self.facts["pool"])


class ImageProjector(nn.Module):
    """Maps features into the embedding space of the language model.

    Args:
        facts: As `MoExtendConfig.projector` lists them.
    """

    layers: nn.Module

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__()
        self.merge = int(facts["merge"])
        self.layers = dense_layers(facts["in_features"] * self.merge**2, facts["out_features"], facts["depth"])
        spec, mlp = UpcycleSpec.from_dict(facts.get("upcycle")), read_mlp(self.layers)
        if spec is not None and mlp is not None:
            self.layers = UpcycledMLP(mlp, spec)

    def forward(self, features_IPC: Tensor) -> Tensor:
        """Projects (I, P, C) features to (I, P / merge^2, D)."""
        projected: Tensor = self.layers(merge_neighbours(features_IPC, self.merge) if self.merge > 1 else features_IPC)
        return projected


def keep_buffers(module: nn.Module) -> None:
    """Lets a module save all its buffers: transformers loads a model without computing those that are not saved."""
    for each in module.modules():
        saved = each.state_dict()
        for name, buffer in list(each.named_buffers(recurse=False)):
            if name not in saved:
                each.register_buffer(name, buffer)
