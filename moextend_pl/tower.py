"""Vision transformers of the transformers library: read at one block, without the blocks behind it.

Shapes: I images, N tokens of one image, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from moextend_pl.contracts import UserError


def vision_config(folder: str) -> PreTrainedConfig:
    """Returns the configuration of a vision model, or of the vision half of an image-text model.

    Args:
        folder: Folder with a `config.json`.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return getattr(config, "vision_config", config)


def make_tower(folder: str, with_weights: bool) -> Any:
    """Builds a vision model.

    Args:
        folder: Folder of a transformers model.
        with_weights: Whether its weights are read; else they are random.
    """
    config = vision_config(folder)
    if not with_weights:
        return AutoModel.from_config(config)
    return AutoModel.from_pretrained(folder, config=config, local_files_only=True, use_safetensors=True)


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
            raise UserError(f"Expected `encoder.layer` in 1..{len(blocks)} or -{len(blocks)}..-1, got {layer}.")
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
        """Returns the parameters that no feature depends on: all that the tower lists behind the block read."""
        parameters = list(self.tower.parameters())
        last = {id(parameter) for parameter in self._last_read.parameters()}
        places = [place for place, parameter in enumerate(parameters) if id(parameter) in last]
        return parameters[max(places) + 1 :]

    def optional_names(self) -> set[str]:
        """Returns the names of unread parameters outside the blocks, which some published files leave out."""
        unread = {id(parameter) for parameter in self.unread_parameters()}
        unread -= {id(parameter) for parameter in blocks_of(self.tower).parameters()}
        return {name for name, parameter in self.tower.named_parameters() if id(parameter) in unread}
