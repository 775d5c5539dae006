"""The extension against tensors that the paper's own code produced (fp32, atol = rtol = 1e-5)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.balance_loop import loop_balance
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moextend_pl.contracts import ExtensionPlan, LayerGrowth
from moextend_pl.moe import dispatch
from moextend_pl.moe.blocks import MoEBlock, find_blocks
from moextend_pl.moe.extension.growth import grow
from moextend_pl.moe.extension.reach import Reach
from moextend_pl.moe.selection import ShiftRule, source_experts
from moextend_pl.moe.usage import RouterRecord, selection_counts
from moextend_pl.training.losses import balance_loss

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


class OneLayer(torch.nn.Module):
    """A model of one decoder layer that is nothing but a mixture-of-experts block."""

    def __init__(self, gate: Tensor, gate_up: Tensor, down: Tensor, implementation: str) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=gate.shape[1],
            intermediate_size=down.shape[2],
            num_local_experts=len(gate),
            num_experts_per_tok=2,
        )
        config._experts_implementation = implementation
        dispatch.register()
        block = MixtralSparseMoeBlock(config)
        block.load_state_dict({"gate.weight": gate, "experts.gate_up_proj": gate_up, "experts.down_proj": down})
        self.layers = torch.nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def extended(tensors: dict[str, Tensor], source: int, implementation: str, **options: str) -> tuple[OneLayer, MoEBlock]:
    base = len(tensors["gate"])
    model = OneLayer(
        tensors["gate"], tensors["gate_up_proj"][:base], tensors["down_proj"][:base], implementation
    ).requires_grad_(False)
    reach = Reach()
    reach.set(torch.ones(len(tensors["x"]), dtype=torch.bool))
    grow(model, ExtensionPlan(layers=(LayerGrowth(0, (source,)),), **options), reach)
    return model, find_blocks(model)[0]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", dispatch.FROZEN_EXPERTS])
def test_block_forward_and_gradients(fixtures: Path, implementation: str) -> None:
    golden = load_file(fixtures / "moextend_block.safetensors")
    model, block = extended(golden, 0, implementation, init="copy", routing="open")
    with torch.no_grad():
        block.router.weight.copy_(golden["new_gate"])
        block.router.calibration.in_proj.copy_(golden["calibration_in"])
        block.router.calibration.out_proj.copy_(golden["calibration_out"])
        block.experts.new.gate_up_proj.copy_(golden["gate_up_proj"][8:])
        block.experts.new.down_proj.copy_(golden["down_proj"][8:])
    x = golden["x"].clone().requires_grad_()
    y = model(x)
    (y * golden["grad_output"]).sum().backward()
    torch.testing.assert_close(y, golden["y"], **TOLERANCE)
    torch.testing.assert_close(block.router(golden["x"])[0], golden["router_logits"], **TOLERANCE)
    for name, value in {
        "grad_x": x.grad,
        "grad_new_gate": block.router.weight.grad,
        "grad_new_gate_up": block.experts.new.gate_up_proj.grad[0],
        "grad_new_down": block.experts.new.down_proj.grad[0],
        "grad_calibration_in": block.router.calibration.in_proj.grad,
        "grad_calibration_out": block.router.calibration.out_proj.grad,
    }.items():
        torch.testing.assert_close(value, golden[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_copy_initialisation(fixtures: Path) -> None:
    golden = load_file(fixtures / "moextend_init.safetensors")
    source = int(golden["source_expert"])
    stock = OneLayer(golden["gate"], golden["gate_up_proj"], golden["down_proj"], "grouped_mm")
    torch.testing.assert_close(stock(golden["x"]), golden["y_base"], **TOLERANCE)
    model, block = extended(golden, source, "grouped_mm", init="copy", routing="open")
    torch.testing.assert_close(model(golden["x"]), golden["y_after_copy"], **TOLERANCE)
    torch.testing.assert_close(block.router(golden["x"])[0], golden["router_logits_after_copy"], **TOLERANCE)
    assert not block.router.calibration.out_proj.any()
    assert 0.01 < block.router.calibration.in_proj.std() < 0.03


def test_preserving_initialisation_keeps_every_token_of_the_same_block(fixtures: Path) -> None:
    golden = load_file(fixtures / "moextend_init.safetensors")
    model, block = extended(golden, int(golden["source_expert"]), "grouped_mm", init="preserving", routing="open")
    y = model(golden["x"])
    torch.testing.assert_close(y, golden["y_base"], **TOLERANCE)
    assert (block.router(golden["x"])[2] == 8).any()
    y.square().sum().backward()
    assert block.experts.new.down_proj.grad.abs().max() > 0
    assert block.router.weight.grad.abs().max() > 0


def golden_records(golden: dict[str, Tensor]) -> list[RouterRecord]:
    logits = [golden[f"router_logits.{layer}"] for layer in range(sum(name.startswith("router_") for name in golden))]
    return [RouterRecord(n, x.shape[1], x, x.softmax(-1).topk(2).indices) for n, x in enumerate(logits)]


def test_balance_loss_scaled_as_in_the_papers_code(fixtures: Path) -> None:
    golden = load_file(fixtures / "moextend_aux_loss.safetensors")
    records, mask = golden_records(golden), golden["attention_mask"].bool().reshape(-1)
    loss = balance_loss(records, [mask] * len(records), reference_scale=9)
    assert loss.item() == pytest.approx(golden["aux_loss_reference"].item(), abs=1e-5)


def test_balance_loss_scaled_by_each_layers_own_experts_is_a_plain_loops(fixtures: Path) -> None:
    golden = load_file(fixtures / "moextend_aux_loss.safetensors")
    records, mask = golden_records(golden), golden["attention_mask"].bool().reshape(-1)
    assert len({record.num_experts for record in records}) > 1
    expected = sum(loop_balance(record, mask) for record in records) / len(records)
    assert balance_loss(records, [mask] * len(records)).item() == pytest.approx(expected, abs=1e-5)


def test_layer_selection_and_source_experts(fixtures: Path) -> None:
    golden = json.loads((fixtures / "moextend_selection.json").read_text())
    before = {layer: torch.tensor(counts) for layer, counts in enumerate(golden["counts_before"])}
    after = {layer: torch.tensor(counts) for layer, counts in enumerate(golden["counts_after"])}
    rule = ShiftRule(golden["fraction"])
    assert list(rule.scores(before, after).values()) == pytest.approx(golden["shift_std"], abs=1e-9)
    layers = rule.choose(before, after)
    assert layers == golden["layers"]
    assert [source_experts(after[layer])[0] for layer in layers] == golden["source_experts_after"]
    assert [source_experts(before[layer])[0] for layer in layers] == golden["source_experts_before"]


def test_counts_are_of_the_most_likely_experts() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.05, 0.05, 0.05, 0.05, 0.06, 0.04]])
    counts = selection_counts(probs.topk(2).indices, 8)
    assert counts.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
