"""Every family that is extended can be held in 4 bits, and computes what its unpacked weights do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_families import VOCABULARY, families, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from moextend_pl.contracts import UserError
from moextend_pl.models.base_model import load_base
from moextend_pl.moe.blocks import find_blocks
from moextend_pl.moe.nf4 import NF4Weight

# Blocks of these are not found at all; that is said by `find_blocks`, packed or not.
REFUSED = ("inkling", "zaya")
# transformers has no automatic class for its text model, so no base of it is loaded from a folder.
WITHOUT_AUTO_CLASS = ("mistral4",)
CASES = [name for name in families() if name not in (*REFUSED, *WITHOUT_AUTO_CLASS)]


def results(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Returns logits, and the gradient that reaches the embeddings through all layers."""
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(5))
    weight = model.eval().requires_grad_(False).get_input_embeddings().weight.requires_grad_()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().mean().backward()
    assert weight.grad is not None
    return logits.detach(), weight.grad


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_packed_family_computes_as_its_unpacked_weights_do(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    packed, twin = load_base(str(tmp_path), "nf4"), load_base(str(tmp_path))
    for name, weight in packed.named_modules():
        if isinstance(weight, NF4Weight):
            with torch.no_grad():
                twin.get_parameter(name).copy_(weight.operand.unpacked(torch.float32))
    for block in find_blocks(packed):
        stacks = [child for child in block.experts.children() if isinstance(child, NF4Weight)]
        assert len(stacks) >= 2, block.path
        assert not any(isinstance(child, NF4Weight) for child in block.router.modules())
        assert not any(p.dim() == 3 and p.is_floating_point() for p in block.experts.parameters())
    head = packed.get_output_embeddings()
    assert head is None or isinstance(head.weight, nn.Parameter)
    for got, expected in zip(results(packed), results(twin), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, atol=1e-5 * max(scale, 1.0), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_family_without_blocks_is_refused(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="router has not one row for each"):
        load_base(str(tmp_path), "nf4")


def test_most_families_are_tested() -> None:
    assert len(CASES) >= 40
