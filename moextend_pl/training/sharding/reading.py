"""Reads of a base what this process is to hold of it, one tensor at a time.

transformers reads, casts, merges and converts the tensors of the files as for any model, and hands each tensor of the
model, before it reads the next, to `ShareReader`, which keeps a part of it. So a process never holds more than its
part, what is whole on every process, and one tensor: at most the experts of a layer, three times while they are merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moextend_pl.moe.blocks import EXPERTS, MoEBlock, expert_count, list_blocks
from moextend_pl.moe.parallel.cut import OfWhole, part_of
from moextend_pl.runs.fingerprints import tensor_sha256
from moextend_pl.runs.manifest import read_manifest
from moextend_pl.training.sharding.strategy import EXPERTS as SHARED_EXPERTS
from moextend_pl.training.sharding.strategy import sharded
from moextend_pl.training.sharding.units import even_dimension, kept_whole

_METHOD = "moextend_share"


@dataclass(frozen=True)
class Share:
    """Which part of a base a process holds.

    Attributes:
        mesh: One dimension, or two: copies, and ranks that share one.
        experts: Whether experts are shared and all else is whole; else all weights of layers are.
        rows: Experts that extensions copy, by layer.
        hashed: Whether tensors will be compared with those of an earlier run.
    """

    mesh: DeviceMesh
    experts: bool
    rows: dict[int, set[int]]
    hashed: bool = False


def reads_parts(module: LightningModule) -> bool:
    """Tells whether the processes read parts of a base: it has experts already, in files.

    Args:
        module: Not built yet.
    """
    start = getattr(module, "init_from", None)
    earlier = {} if start is None else read_manifest(start).model.get("language", {})
    languages: list[Any] = [part for part in module.modules() if hasattr(part, "compute")]
    return not earlier.get("upcycle") and all(
        language.base is not None and not language.dense and language.upcycle_spec is None for language in languages
    )


def share_of(module: LightningModule) -> Share | None:
    """Returns which part of its base a module is to read; None where it reads the whole.

    Args:
        module: A stage whose plans are declared.
    """
    strategy = sharded(module)
    if strategy is None or torch.get_default_device().type == "meta" or not reads_parts(module):
        return None
    start: Any = getattr(module, "init_from", None)
    own: Any = module.extension_plan
    rows: dict[int, set[int]] = {}
    for plan in (*(() if start is None else read_manifest(start).plans), *(() if own is None else (own,))):
        for growth in plan.layers:
            rows.setdefault(growth.layer, set()).update(growth.sources)
    return Share(strategy.shard_mesh, strategy.share == SHARED_EXPERTS, rows, hashed=start is not None)


def shared_parameters(model: PreTrainedModel, share: Share) -> dict[str, int]:
    """Lists the parameters of which a process reads a part, with the dimension that ranks share.

    Routers are not among them, of which extensions read rows, nor what transformers ties.

    Args:
        model: As transformers makes it; may have no memory.
        share: Which part.
    """
    blocks, ranks = list_blocks(model), share.mesh.size(-1)
    if share.experts:
        return {
            name: 0
            for block in blocks
            for name, value in _stacks(block).items()
            if expert_count(block.experts) % ranks == 0
        }
    tied = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    whole, stacks = kept_whole(model), {name for block in blocks for name in _stacks(block)}
    apart = tuple(f"{block.path}.{name}." for block in blocks for name in (block.router_name, EXPERTS))
    found = {}
    for name, parameter in model.named_parameters():
        dimension = even_dimension(ranks, parameter)
        open_ = name in stacks or (parameter.dim() > 1 and not name.startswith(apart))
        if dimension is not None and open_ and name not in tied and parameter not in whole:
            found[name] = dimension
    return found


def _stacks(block: MoEBlock) -> dict[str, Tensor]:
    """Returns the tensors of a block that hold one entry for each expert."""
    count = expert_count(block.experts)
    return {
        f"{block.path}.{EXPERTS}.{name}": value
        for name, value in block.experts._parameters.items()
        if value is not None and value.dim() and len(value) == count
    }


class ShareConfig(QuantizationConfigMixin):
    """Names `ShareReader` to transformers, which takes what changes weights while they are read for a quantizer.

    Args:
        share: Which part a process holds.
    """

    def __init__(self, share: Share) -> None:
        self.quant_method: Any = _METHOD
        self.share = share

    def __deepcopy__(self, memo: dict[int, Any]) -> ShareConfig:
        return self  # a mesh of processes has no copies


class _Keep(ConversionOps):
    """The last step of reading a weight: a part of it goes into the model."""

    def __init__(self, parts: dict[str, int], rows: dict[str, list[int]], share: Share) -> None:
        self.parts, self.rows, self.share = parts, rows, share

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Keeps parts of the tensors that are listed and returns the others.

        Args:
            input_dict: Tensors, merged and converted, by the name they have in the model.
            source_patterns: Not used.
            target_patterns: Not used.
            kwargs: Has `model`, and `missing_keys`, the names that are still to be read.
        """
        rest = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            path, _, leaf = name.rpartition(".")
            module = kwargs["model"].get_submodule(path)
            expected = module._parameters.get(leaf)
            fits = expected is not None and tensor.shape == expected.shape
            if name in self.parts and fits and tensor.dtype == torch.get_default_dtype():
                module._parameters[leaf] = self._part(name, tensor)
                kwargs["missing_keys"].discard(name)
            else:
                self.parts.pop(name, None)  # transformers then says what does not fit
                rest[name] = value
        return rest

    def _part(self, name: str, value: Tensor) -> Tensor:
        part = part_of(value, self.share.mesh, self.parts[name]).requires_grad_(value.is_floating_point())
        copied = {row: value[row].clone() for row in self.rows.get(name, ()) if row < len(value)}
        # The first is read by transformers: nothing here is left to be drawn at random.
        vars(part).update(
            _is_hf_initialized=True,
            of_whole=OfWhole(copied, tensor_sha256(value) if self.share.hashed else ""),
        )
        return part


@register_quantizer(_METHOD)
class ShareReader(HfQuantizer):
    """Keeps a part of the tensors listed by `shared_parameters` while transformers reads them."""

    def __init__(self, quantization_config: ShareConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._share = quantization_config.share
        self._parts: dict[str, int] = {}
        self._rows: dict[str, list[int]] = {}
        self._shapes: dict[str, torch.Size] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> PreTrainedModel:
        self._parts = shared_parameters(model, self._share)
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for block in list_blocks(model):
            rows = sorted(self._share.rows.get(block.layer, ()))
            self._rows.update(dict.fromkeys(_stacks(block), rows))
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_kwargs: Any) -> bool:
        """Returns whether a part of a parameter is kept."""
        return param_name in self._parts

    def get_quantize_ops(self) -> ConversionOps:
        """Returns the operation that keeps it."""
        return _Keep(self._parts, self._rows, self._share)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> PreTrainedModel:
        """Takes the marks of a quantised model off: its weights are as in the files.

        Raises:
            RuntimeError: If a weight is of another shape, which earlier versions of transformers let a quantizer do.
        """
        for name, parameter in model.named_parameters():
            if parameter.shape != self._shapes.get(name, parameter.shape):
                expected = tuple(self._shapes[name])
                raise RuntimeError(f"size mismatch for {name}: {tuple(parameter.shape)}, expected {expected}")
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                for name in ("quantization_config", "_is_quantized"):
                    vars(module.config).pop(name, None)
        return model

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """Returns True: nothing is packed."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True
