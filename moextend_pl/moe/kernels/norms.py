"""RMSNorm by a kernel of liger-kernel, where it is installed and asked for.

A norm of the base is exchanged for a module that holds the same weight under the same name, if on random numbers it
computes what the kernel does, so that no norm of another kind is taken for it.
"""

from __future__ import annotations

import copy
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from moextend_pl.contracts import UserError

EPS_NAMES = ("variance_epsilon", "eps")


def check_liger(asked: bool, compiled: bool) -> None:
    """Refuses `liger` where the package is not there, or has nothing to do.

    Raises:
        UserError: If it is not installed, or layers are compiled.
    """
    if asked and compiled:
        raise UserError(
            "Expected `compile` or `liger`, got both: a compiled layer fuses its norms by itself. Remove `liger`."
        )
    if asked and find_spec("liger_kernel") is None:
        raise UserError(
            "`liger: true` needs the package liger-kernel, which is not installed: pip install liger-kernel, or remove "
            "`liger`."
        )


class LigerNorm(nn.Module):
    """RMSNorm in one kernel on a GPU, and as transformers computes it elsewhere.

    Args:
        weight: Of the norm in whose place it stands, (D,).
        eps: Added to the mean of squares.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns `weight * x / rms(x)`, the mean of squares in fp32."""
        if hidden_states.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
            from liger_kernel.ops import LigerRMSNormFunction

            # Not in place: what comes back may be another branch's gradient too.
            fused: Tensor = LigerRMSNormFunction.apply(
                hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False, None
            )
            return fused
        return plain_norm(hidden_states, self.weight, self.variance_epsilon)


def plain_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Returns RMSNorm as most families of transformers compute it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * wide.to(x.dtype)


def use_liger_norms(model: nn.Module, asked: bool = True) -> int:
    """Exchanges the norms of a model for kernels where that is asked for and they are of the plain kind, in place.

    Args:
        model: A transformers model, on any device, `meta` included.
        asked: Whether to exchange them.

    Returns:
        How many were exchanged.
    """
    plain = [(name, module) for name, module in model.named_modules() if asked and _is_plain(module)]
    for name, module in plain:
        path, _, last = name.rpartition(".")
        fused = LigerNorm(module.weight, _eps(module))
        setattr(model.get_submodule(path), last, fused.train(module.training))
    return len(plain)


def _eps(module: nn.Module) -> float:
    return next((value for name in EPS_NAMES if isinstance(value := getattr(module, name, None), float)), 0.0)


def _is_plain(module: nn.Module) -> bool:
    named = dict(module.named_parameters())
    if set(named) != {"weight"} or named["weight"].dim() != 1 or next(module.buffers(), None) is not None:
        return False
    if isinstance(module, LigerNorm) or not _eps(module) or next(module.children(), None) is not None:
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    width = named["weight"].numel()
    x, weight = (torch.randn(n, width, generator=generator, device="cpu").bfloat16() for n in (4, 1))
    twin: Any = copy.copy(module)
    twin._parameters = {**module._parameters, "weight": nn.Parameter(weight[0], requires_grad=False)}
    try:
        with torch.no_grad(), torch.device("cpu"):
            return torch.equal(twin(x), plain_norm(x, weight[0], _eps(module)))
    except (TypeError, RuntimeError):  # it takes more than one tensor
        return False
