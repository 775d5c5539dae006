"""Norms of a base exchanged for kernels of liger-kernel: which ones, under which names, with which numbers."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.tiny_world import TinyWorld, tiny_mixtral
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from moextend_pl.contracts import UserError
from moextend_pl.models.base_model import ComputeSpec, check_options
from moextend_pl.moe.kernels import norms
from moextend_pl.moe.kernels.norms import LigerNorm, use_liger_norms


def test_norms_keep_their_names_weights_and_numbers() -> None:
    model, x = tiny_mixtral(num_hidden_layers=2), torch.arange(6).view(1, 6)
    for norm in (m for m in model.modules() if "RMSNorm" in type(m).__name__):
        nn.init.normal_(norm.weight)
    weights, expected = dict(model.named_parameters()), model(x).logits
    assert use_liger_norms(model) == 5
    assert use_liger_norms(model) == 0
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in weights.items()}
    assert torch.equal(model(x).logits, expected)


def test_a_norm_of_another_kind_is_left_alone() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8, vocab_size=8, pad_token_id=0)
    assert use_liger_norms(Gemma2ForCausalLM(config)) == 0  # it multiplies by 1 + weight
    assert use_liger_norms(nn.Sequential(nn.LayerNorm(4, bias=False), nn.Linear(4, 4))) == 0


def test_norms_of_a_model_without_memory_are_exchanged() -> None:
    with torch.device("meta"):
        model = tiny_mixtral(num_hidden_layers=1)
    assert use_liger_norms(model) == 3


def test_the_kernel_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    package, ops = ModuleType("liger_kernel"), ModuleType("liger_kernel.ops")

    class LigerRMSNormFunction:
        @staticmethod
        def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
            called.append((eps, offset, casting_mode, in_place, row_mode))
            return norms.plain_norm(X, W, eps)

    ops.LigerRMSNormFunction = LigerRMSNormFunction  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    LigerNorm(nn.Parameter(torch.ones(4)), 1e-5)(torch.randn(2, 4))
    assert called == [(1e-5, 0.0, "llama", False, None)]


def test_the_option_exchanges_them_and_is_refused_without_the_package(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        check_options(str(tiny_world.base), None, ComputeSpec(liger=True), upcycled=False)
    with pytest.raises(UserError, match="Remove `liger`"):
        check_options(str(tiny_world.base), None, ComputeSpec(liger=True, compile=True), upcycled=False)
    monkeypatch.setattr(norms, "find_spec", lambda name: name)
    model = tiny_world.model(liger=True)
    assert any(isinstance(module, LigerNorm) for module in model.language.modules())
