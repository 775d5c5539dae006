"""What is read from a published checkpoint is checked first and computes what it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.published import SIZES, convert
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from moextend_pl.convert.files import TensorFiles
from moextend_pl.convert.incoming import language_config
from moextend_pl.module import MoExtend

# As in the files of CuMo-mistral-7b, written by transformers v4, but for the rotation, which is faster to be seen.
AS_PUBLISHED = {**SIZES, "rope_theta": 50.0, "sliding_window": None, "torch_dtype": "float32"}
STOCK = {"mistral": (MistralConfig, MistralForCausalLM), "mixtral": (MixtralConfig, MixtralForCausalLM)}


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}], ids=["plain", "scaled"])
@pytest.mark.parametrize("kind", STOCK)
@torch.no_grad()
def test_language_model_of_a_config_of_transformers_v4_rotates_positions_as_published(
    published: Callable, kind: str, scaling: dict | None, tmp_path: Path
) -> None:
    source, _ = published(f"cumo {kind}")
    own = {**AS_PUBLISHED, "rope_scaling": scaling, "head_dim": 8}
    own |= {"num_local_experts": 4} if kind == "mixtral" else {}
    (source / "config.json").write_text(json.dumps({**own, "model_type": f"llava_{kind}", "num_experts": 2}))
    convert("cumo", source, tmp_path / "run", "--heads", "2")
    make_config, make = STOCK[kind]
    stock = make(make_config(**own)).eval()
    weights = make.from_pretrained(tmp_path / "stock", dtype=torch.float32).state_dict()
    stock.load_state_dict(weights)
    ids = torch.arange(1, 25)[None]
    logits = MoExtend.load(tmp_path / "run").language.model(ids).logits
    torch.testing.assert_close(logits, stock(ids).logits)
    assert language_config(TensorFiles(source).config()).torch_dtype == torch.float32
