"""The mixture that `assemble` makes against the released layer of Uni-MoE, run on CPU in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moextend_pl.contracts import UpcycleSpec
from moextend_pl.convert.assembly import PUBLISHED, assembled
from moextend_pl.moe.dense_mlp import DenseMLP
from moextend_pl.moe.upcycle import UpcycledMLP
from moextend_pl.moe.usage import RouterRecord
from moextend_pl.training.losses import balance_loss

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def stock(experts: int, width: int, hidden: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_local_experts": experts}
    config = MixtralConfig(**sizes, num_experts_per_tok=2, router_jitter_noise=0.0)
    config._experts_implementation = "eager"
    return MixtralSparseMoeBlock(config)


def upcycled(experts: int, width: int, hidden: int) -> nn.Module:
    maps = [nn.Linear(*sizes, bias=False) for sizes in ((width, hidden), (hidden, width), (width, hidden))]
    return UpcycledMLP(DenseMLP(maps[0], maps[1], nn.SiLU(), maps[2]), UpcycleSpec(experts=experts, top_k=2))


def expert_tensors(golden: dict[str, Tensor], expert: int) -> dict[str, Tensor]:
    """Returns the MLP of one expert as the dense model had it."""
    return {f"model.layers.0.mlp.{kind}_proj.weight": golden[f"{kind}_proj"][expert] for kind in PUBLISHED}


@pytest.mark.parametrize("make", [stock, upcycled])
def test_layer_of_assembled_experts(fixtures: Path, make: Callable[[int, int, int], nn.Module]) -> None:
    golden = load_file(fixtures / "uni_moe_layer.safetensors")
    experts, hidden, width = golden["gate_proj"].shape
    # Through the names that `assemble` writes, stacked as transformers stacks them.
    made = dict(assembled([expert_tensors(golden, e) for e in range(experts)], UpcycleSpec(experts=experts)))
    prefix = "model.layers.0.block_sparse_moe.experts"
    w1, w2, w3 = (torch.stack([made[f"{prefix}.{e}.w{n}.weight"] for e in range(experts)]) for n in (1, 2, 3))
    block = make(experts, width, hidden)
    weights = {"gate.weight": golden["gate"], "experts.gate_up_proj": torch.cat([w1, w3], 1), "experts.down_proj": w2}
    block.load_state_dict(weights)
    x = golden["x"].clone().requires_grad_()
    y = block(x)
    (y * golden["grad_output"]).sum().backward()
    torch.testing.assert_close(y, golden["y"], **TOLERANCE)
    torch.testing.assert_close(x.grad, golden["grad_x"], **TOLERANCE)
    torch.testing.assert_close(block.gate.weight.grad, golden["grad_gate"], **TOLERANCE)
    torch.testing.assert_close(block.experts.gate_up_proj.grad[:, :hidden], golden["grad_gate_proj"], **TOLERANCE)
    torch.testing.assert_close(block.experts.down_proj.grad, golden["grad_down"], **TOLERANCE)


def test_balance_loss_counts_first_choices(fixtures: Path) -> None:
    golden = load_file(fixtures / "uni_moe_layer.safetensors")
    block = stock(*(golden["gate_proj"].shape[n] for n in (0, 2, 1)))
    block.gate.load_state_dict({"weight": golden["gate"]})
    x = golden["x"].clone().requires_grad_()
    logits, _, indices = block.gate(x)
    torch.testing.assert_close(logits, golden["router_logits"], **TOLERANCE)
    record = RouterRecord(0, len(golden["gate"]), logits, indices)
    loss = balance_loss([record], [torch.ones(len(logits), dtype=torch.bool)], choices=1)
    loss.backward()
    torch.testing.assert_close(loss, golden["aux_loss"][0], **TOLERANCE)
    torch.testing.assert_close(x.grad, golden["aux_grad_x"], **TOLERANCE)
    torch.testing.assert_close(block.gate.weight.grad, golden["aux_grad_gate"], **TOLERANCE)
