"""Packs the Linear layers and experts of a base in 4 bits while it is read, one weight at a time.

transformers reads the files, merges and converts their tensors as it does for any model, and
hands each weight of the skeleton (which has no memory) to `NF4Quantizer`, which packs it before the
next is read. So no more than one weight, an expert stack of one layer at most, is ever held in full.

Not packed: routers and gates, norms, embeddings, the output head, biases, and whatever learns.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moextend_pl.contracts import UserError
from moextend_pl.moe.blocks import EXPERTS, find_blocks
from moextend_pl.moe.nf4 import BLOCK, QUANT_TYPE, NF4Weight, pack

KINDS = (QUANT_TYPE,)
_METHOD = "moextend_nf4"


def packable(model: PreTrainedModel, dense: bool = False) -> dict[str, nn.Parameter]:
    """Lists the weights that are to be packed: of all experts, and of the Linear layers that carry no decision.

    Args:
        model: A model whose weights are not packed; may have no memory.
        dense: Whether it is meant to have no experts.

    Returns:
        Parameters by name.

    Raises:
        UserError: If one does not divide into blocks, or there are no experts that should be there.
    """
    blocks = [] if dense else find_blocks(model)
    kept = [*HfQuantizer.get_modules_to_not_convert(model), *(f"{b.path}.{b.router_name}" for b in blocks)]
    found = {
        f"{block.path}.{EXPERTS}.{name}": parameter
        for block in blocks
        for name, parameter in block.experts.named_parameters()
        if parameter.dim() == 3 and parameter.is_floating_point()
    }
    for path, module in model.named_modules():
        # One output is a gate, such as that of Qwen2-MoE's shared expert; it decides as a router does.
        is_plain = type(module) is nn.Linear and module.out_features > 1 and isinstance(module.weight, nn.Parameter)
        if is_plain and not any(path == name or path.startswith(f"{name}.") for name in kept):
            found[f"{path}.weight"] = module.weight
    for name, parameter in found.items():
        rows, columns = parameter.shape[-2:]
        if rows * columns % BLOCK:
            raise UserError(
                f"Expected matrices of a multiple of {BLOCK} weights for `quantize`, got {name} of shape "
                f"{tuple(parameter.shape)}. Load this base without `quantize`."
            )
    return found


def replace_weight(model: nn.Module, name: str, weight: Tensor) -> None:
    """Puts a packed weight in the place of a parameter.

    Args:
        model: Holds the parameter.
        name: Dotted name of the parameter.
        weight: Its values.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    stand_in = NF4Weight(*pack(weight), weight.shape, weight.dtype).to(weight.device)
    # Read by the initialisation functions of transformers: nothing here is left to be drawn at random.
    setattr(stand_in, "_is_hf_initialized", True)  # noqa: B010
    delattr(module, leaf)
    module.add_module(leaf, stand_in)


class NF4Config(QuantizationConfigMixin):
    """Names `NF4Quantizer` to transformers.

    Args:
        dense: Whether the model is meant to have no experts.
    """

    def __init__(self, dense: bool = False) -> None:
        self.quant_method: Any = _METHOD
        self.dense = dense


class _Pack(ConversionOps):
    """The last step of reading a weight: it goes into the model packed."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Packs the weights that are listed and returns the others.

        Args:
            input_dict: Tensors, merged and converted, by the name they have in the model.
            source_patterns: Not used.
            target_patterns: Not used.
            kwargs: Has `model`, and `missing_keys`, the names that are still to be read.
        """
        rest = {}
        for name, value in input_dict.items():
            if name in self.names:
                replace_weight(kwargs["model"], name, value[0] if isinstance(value, list) else value)
                kwargs["missing_keys"].discard(name)
            else:
                rest[name] = value
        return rest


@register_quantizer(_METHOD)
class NF4Quantizer(HfQuantizer):
    """Packs the weights listed by `packable` while transformers reads them."""

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dense, self._names = quantization_config.dense, set[str]()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> PreTrainedModel:
        self._names = set(packable(model, self._dense))
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_kwargs: Any) -> bool:
        """Returns whether a parameter is to be packed."""
        return param_name in self._names

    def get_quantize_ops(self) -> ConversionOps:
        """Returns the operation that packs."""
        return _Pack(self._names)

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """Returns False: a run saves what is new, and the base is its own files."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether what is added to the model can be trained."""
        return True


def check_packed(model: PreTrainedModel, dense: bool = False) -> None:
    """Asserts that every expert stack and every Linear layer that should be packed is.

    Args:
        model: As loaded.
        dense: Whether it is meant to have no experts.

    Raises:
        UserError: If a weight was left as it was.
    """
    left = packable(model, dense)
    if left:
        done = sum(isinstance(module, NF4Weight) for module in model.modules())
        raise UserError(
            f"`quantize` was asked for, but {len(left)} of {len(left) + done} weights are not in 4 bits, for example "
            f"{next(iter(left))}. The files of the base lack them, or this family cannot be quantised: load it without "
            "`quantize`."
        )
