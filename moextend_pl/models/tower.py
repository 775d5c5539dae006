"""Vision transformers of the transformers library: read at one block, without the blocks behind it.

Shapes: I images, N tokens of one image, D width, C channels of a grid, g its side.
"""

from __future__ import annotations

import difflib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig

from moextend_pl.contracts import UserError
from moextend_pl.models.model_folder import read_config, read_model
from moextend_pl.runs.fingerprints import check_weight_file, check_weights
from moextend_pl.samples.preprocessor import PREPROCESSOR_FILE, Statistics, own_statistics, read_preprocessor
from moextend_pl.samples.tiling.tiles import Tiling

MASK_TOKEN = "mask_token"


@dataclass(frozen=True)
class FeatureSpec:
    """What is read of a tower.

    Attributes:
        layer: For timm the index of the feature level, for transformers the index of the hidden state. Blocks
            behind it are not built.
        pool: Side of the squares over which the feature grid is averaged.
        scales: Scales at which an image is encoded; their channels stand side by side (S2). By default [1].
        reference: Whether blocks that nothing reads are kept and computed, as in the published code of CuMo.
        resize: How images that are not square become one: `squash`, `pad` (with the mean colour, as LLaVA-1.5), `crop`
            (shorter side to the image size, then the middle), or `crop:N` (shorter side to N first; `squash:N`: both
            sides). By default what the tower's preprocessor_config.json says, else `squash`.
        resample: Filter by which images change their size: `nearest`, `lanczos`, `bilinear`, `bicubic`, `box` or
            `hamming`. By default what the tower says, else `bicubic`.
        tiles: Most tiles that an image is cut into beside its thumbnail, each encoded as an image (NVLM): `6`; `6:area`
            weighs the area of grids; `6:untagged` writes no tag before a tile. By default images stay whole.
    """

    layer: int = -2
    pool: int = 1
    scales: list[int] | None = None
    reference: bool = False
    resize: str | None = None
    resample: str | None = None
    tiles: int | str | None = None


def checked_tiles(tiles: int | str | None, alone: bool) -> str:
    """Returns how images are cut, empty where they stay whole.

    Args:
        tiles: As `FeatureSpec` has it.
        alone: Whether the tower is trained alone, by contrast of whole images with captions.

    Raises:
        UserError: If it is no such number, or the tower is trained alone.
    """
    if Tiling.parse(tiles).most and alone:
        raise UserError(
            f"Expected no `features.tiles` of a tower that is trained alone, got {tiles}: it compares whole images "
            "with captions. Leave it out here, and set it in the stages behind."
        )
    return str(tiles or "")


def vision_config(folder: str) -> PreTrainedConfig:
    """Returns the configuration of a vision model, or of the vision half of an image-text model.

    Args:
        folder: Folder with a `config.json`.
    """
    config = read_config(folder)
    return getattr(config, "vision_config", config)


def check_folder(folder: str) -> None:
    """Refuses a folder without a transformers model.

    Raises:
        UserError: If it has no `config.json`.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"Expected a transformers vision model in {folder}, found no config.json. Put the model there, correct "
            "`encoder.name`, or name a timm model as `timm/<model>`."
        )


def make_timm(name: str, layer: int, options: dict[str, Any]) -> Any:
    """Builds a timm model up to one of its feature levels, with random weights.

    Args:
        name: Of the model.
        layer: Index of the level.
        options: Further arguments of `timm.create_model`.

    Raises:
        UserError: If timm has no such model or level, or refuses the options.
    """
    if ":" not in name and not timm.is_model(name):  # a colon names another source of models
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean 'timm/{close[0]}'?" if close else "`timm.list_models()` lists them."
        raise UserError(f"Expected `encoder.name` to be a model of timm, got '{name}'; {hint}")
    try:
        return timm.create_model(name, features_only=True, out_indices=(layer,), **options)
    except (IndexError, AssertionError, TypeError, RuntimeError) as error:
        raise UserError(
            f"timm cannot build '{name}' with `layer` {layer} and `tower_args` {options}: {type(error).__name__} "
            f"{error}. Correct them."
        ) from error


def make_tower(folder: str, with_weights: bool) -> Any:
    """Builds a vision model.

    Args:
        folder: Folder of a transformers model.
        with_weights: Whether its weights are read; else they are random.

    Raises:
        UserError: If they are damaged, or lack some that are read.
    """
    if with_weights:
        check_weights(Path(folder))
        return vision_half(read_model(AutoModel, folder, _is_unread, dtype=torch.float32))
    return vision_half(AutoModel.from_config(read_config(folder), dtype=torch.float32))


def vision_half(model: Any) -> Any:
    """Returns the image side of a transformers model of images and texts (CLIP, SigLIP); another model as it is."""
    return getattr(model, "vision_model", model) if hasattr(model.config, "vision_config") else model


def _is_unread(name: str) -> bool:
    """Tells whether a weight is of the text side, stands behind all blocks of the image side, or is for pretraining."""
    text = name.startswith(("text_model.", "text_projection", "logit_"))
    return text or MASK_TOKEN in name or ("layers." not in name and "embed" not in name)


def image_statistics(*folders: str) -> Statistics:
    """Returns `image_mean` and `image_std` that a transformers tower learned with.

    Args:
        folders: Where to look, the first one with the file first.

    Raises:
        UserError: If no folder says.
    """
    return own_statistics(read_preprocessor(*folders), str(Path(folders[0]) / PREPROCESSOR_FILE))


def save_facts(tower: Any, path: Path, *folders: str) -> None:
    """Writes the configuration of a transformers tower and the image statistics that it learned with, if it says.

    Args:
        tower: The tower.
        path: Folder to write to.
        folders: Where the statistics may lie, as for `image_statistics`.
    """
    tower.config.save_pretrained(path)
    # A tower whose own folder does not say can still be saved; its data asks for the file when it is used.
    with suppress(UserError):
        (path / PREPROCESSOR_FILE).write_text(json.dumps(image_statistics(*folders), indent=2) + "\n")


def cast_for(tower: nn.Module, pixels_I3HW: Tensor) -> Tensor:
    """Returns images in the type of a tower's weights, to which nothing else brings them outside Lightning's loops."""
    floating = (parameter.dtype for parameter in tower.parameters() if parameter.is_floating_point())
    return pixels_I3HW.to(next(floating, pixels_I3HW.dtype))


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """Returns the stack of transformer blocks, found as the longest list of modules.

    Raises:
        UserError: If the tower has no list of modules.
    """
    stacks = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise UserError(f"Expected a vision transformer with a list of blocks, got {type(tower).__name__}.")
    return max(stacks, key=len)


class BlockReader:
    """Reads the output of one block of a tower; what stands behind it is taken off.

    Args:
        tower: The tower, with all its blocks.
        layer: Index of the hidden state to read, as transformers counts: -1 is the output of the last block,
            -2 its input.
        keep_unread: Whether blocks behind the one read stay and are computed, as the published code of
            CuMo does, whose routers in them take part in the losses.

    Raises:
        UserError: If there is no such block.
    """

    def __init__(self, tower: nn.Module, layer: int, keep_unread: bool) -> None:
        self.tower = tower
        self._output: Tensor | None = None
        blocks = blocks_of(tower)
        read = layer if layer >= 0 else len(blocks) + 1 + layer
        if not 1 <= read <= len(blocks):
            raise UserError(
                f"Expected `encoder.features.layer` in 1..{len(blocks)} or -{len(blocks)}..-1, got {layer}."
            )
        self.dropped = tuple(
            f"{name}.{index}."
            for name, module in tower.named_modules()
            for index in range(read, len(blocks))
            if module is blocks and not keep_unread
        )
        if not keep_unread:
            del blocks[read:]
        blocks[read - 1].register_forward_hook(self._keep)
        self._last_read = blocks[read - 1]

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._output = output if isinstance(output, Tensor) else output[0]

    def __call__(self, pixels_I3HW: Tensor) -> Tensor:
        """Returns the hidden state, (I, N, D)."""
        self.tower(pixel_values=pixels_I3HW)
        output, self._output = self._output, None
        assert output is not None
        return output

    def unread_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that no feature depends on: all behind the block read, and what masks patches."""
        named = list(self.tower.named_parameters())
        last = {id(parameter) for parameter in self._last_read.parameters()}
        end = max(place for place, (_, parameter) in enumerate(named) if id(parameter) in last) + 1
        # DINO's tower has a token that stands for masked patches, which only its own training has.
        masks = [parameter for name, parameter in named[:end] if name.rpartition(".")[2] == MASK_TOKEN]
        return [*masks, *(parameter for _, parameter in named[end:])]

    def optional_names(self) -> set[str]:
        """Returns the names of unread parameters outside the blocks, which some published files leave out."""
        unread = {id(parameter) for parameter in self.unread_parameters()}
        unread -= {id(parameter) for parameter in blocks_of(self.tower).parameters()}
        return {name for name, parameter in self.tower.named_parameters() if id(parameter) in unread}


def read_grid(tower: Any, reader: BlockReader | None, pixels_I3HW: Tensor, side: int) -> Tensor:
    """Returns the (I, C, g, g) features that a tower makes of images.

    Args:
        tower: The tower.
        reader: Of a transformers tower; None for a timm one, whose features are a grid already.
        pixels_I3HW: Normalised images.
        side: g.
    """
    pixels_I3HW = cast_for(tower, pixels_I3HW)
    if reader is None:
        grid_ICgg: Tensor = tower(pixels_I3HW)[-1]
        return grid_ICgg
    patches = reader(pixels_I3HW)[:, -side * side :]  # a class token, if any, comes first
    return patches.transpose(1, 2).unflatten(2, (side, side))


def pooled_tokens(grid_ICgg: Tensor, pool: int) -> Tensor:
    """Averages a grid over squares of side `pool` and returns its (I, P, C) tokens, row by row."""
    grid_ICgg = F.avg_pool2d(grid_ICgg, pool) if pool > 1 else grid_ICgg
    return grid_ICgg.flatten(2).transpose(1, 2)


def load_tower(tower: nn.Module, path: Path, reader: BlockReader | None) -> None:
    """Reads the weights of a tower.

    Args:
        tower: Built, without the blocks that nothing reads.
        path: safetensors file; it may hold these blocks, and may lack what stands behind all blocks.
        reader: Of a transformers tower; None for a timm one.

    Raises:
        UserError: If tensors are missing, unexpected or of another shape.
    """
    check_weight_file(path)
    dropped, optional = (reader.dropped, reader.optional_names()) if reader else ((), set())
    tensors = {name: t for name, t in load_file(path).items() if not any(map(name.startswith, dropped))}
    expected = tower.state_dict()
    wrong = [n for n, t in expected.items() if n in tensors and t.shape != tensors[n].shape]
    wrong += sorted((expected.keys() - optional) ^ (tensors.keys() - optional))
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} tensors are missing, unexpected or of another shape, for example {wrong[:3]}. "
            "Save or convert the tower anew."
        )
    tower.load_state_dict(tensors, strict=False)
