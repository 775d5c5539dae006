"""Upcycled blocks, projector and multi-scale tower against the published code of CuMo, run on CPU in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from moextend_pl.contracts import UpcycleSpec
from moextend_pl.convert.entries import Entry, clip_block_entries, projector_entries
from moextend_pl.convert.incoming import convert_in
from moextend_pl.convert.outgoing import convert_out
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.projector import Projector
from moextend_pl.models.tower import FeatureSpec
from moextend_pl.moe.upcycle import upcycle
from moextend_pl.moe.watch import RouterWatch
from moextend_pl.training.losses import RouterLosses, image_router_losses

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SPEC = UpcycleSpec(experts=4, top_k=2)


def load(module: nn.Module, entries: list[Entry], golden: dict[str, Tensor]) -> None:
    module.load_state_dict({entry.ours: entry.join(golden) for entry in entries})


def losses_of(records: list, images: int, routers: int = 1) -> RouterLosses:
    return image_router_losses(records, images, routers, SPEC, torch.device("cpu"))


def assert_gradients(module: nn.Module, entries: list[Entry], golden: dict[str, Tensor], prefix: str) -> None:
    parameters = dict(module.named_parameters())
    assert {entry.ours for entry in entries} == set(parameters)
    for entry in entries:
        for name, value in entry.split(parameters[entry.ours].grad).items():
            expected = golden["grad." + name.removeprefix(prefix)]
            torch.testing.assert_close(value, expected, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def check_losses(got: RouterLosses, golden: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got.balance, golden["balance_loss"][0], **TOLERANCE)
    torch.testing.assert_close(got.z, golden["router_z_loss"][0], **TOLERANCE)


def assert_both_ways(call: Callable[[Tensor], Tensor], watch: RouterWatch, golden: dict[str, Tensor]) -> None:
    x = golden["x"].clone().requires_grad_()
    with watch.recording() as records:
        y = call(x)
    losses = losses_of(records, len(x))
    ((y * golden["grad_output"]).sum() + 0.1 * losses.balance + 0.01 * losses.z).backward()
    torch.testing.assert_close(y, golden["y"], **TOLERANCE)
    torch.testing.assert_close(x.grad, golden["grad_x"], **TOLERANCE)
    check_losses(losses, golden)


def test_clip_block(fixtures: Path) -> None:
    golden = load_file(fixtures / "cumo_clip_moe_layer.safetensors")
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, hidden_act="quick_gelu")
    config._attn_implementation = "eager"
    blocks = nn.ModuleList([CLIPEncoderLayer(config)])
    upcycle(blocks, SPEC)
    block, watch = blocks[0], RouterWatch()
    entries = clip_block_entries(4, "layer.")
    load(block, entries, golden)
    watch.attach(blocks)
    assert_both_ways(lambda x: block(x, None), watch, golden)
    assert_gradients(block, entries, golden, "layer.")


def test_projector(fixtures: Path) -> None:
    golden = load_file(fixtures / "cumo_mlp_moe.safetensors")
    projector = Projector("mlp2x_gelu", in_features=64, out_features=24, upcycle=SPEC)
    projector.configure_model()
    entries = projector_entries(4, "projector.")
    load(projector, entries, golden)
    assert_both_ways(projector, projector.watch, golden)
    assert_gradients(projector, entries, golden, "projector.")


def test_multi_scale_tower_through_the_converter(fixtures: Path, tmp_path: Path) -> None:
    golden = load_file(fixtures / "cumo_s2_tower.safetensors")
    tower = {name.removeprefix("tower."): t for name, t in golden.items() if name.startswith("tower.")}
    torch.save(tower, tmp_path / "clip.bin")
    convert_in(tmp_path / "clip.bin", tmp_path / "run", "cumo", heads=4)
    path = str(tmp_path / "run" / "encoder")
    encoder = VisionEncoder(path=path, features=FeatureSpec(scales=[1, 3], reference=True))
    encoder.configure_model()
    with encoder.watch.recording() as records:
        features = encoder.eval()(golden["pixel_values"])
    torch.testing.assert_close(features, golden["features"], **TOLERANCE)
    check_losses(losses_of(records, 2, routers=6), golden)
    trimmed = VisionEncoder(path=path)
    trimmed.configure_model()
    torch.testing.assert_close(trimmed.eval()(golden["pixel_values"]), golden["features"], **TOLERANCE)
    assert trimmed.num_experts == {0: 4, 1: 4}, "the block that nothing reads is not built"
    convert_out(tmp_path / "run", tmp_path / "back", "cumo")
    back = torch.load(tmp_path / "back" / "clip.bin", weights_only=True)
    assert set(back) == set(tower)
    assert all(torch.equal(back[name], tensor) for name, tensor in tower.items())


def test_features_of_the_last_block_reach_no_loss_but_its_router_does(fixtures: Path, tmp_path: Path) -> None:
    golden = load_file(fixtures / "cumo_s2_tower.safetensors")
    tower = {name.removeprefix("tower."): t for name, t in golden.items() if name.startswith("tower.")}
    save_file(tower, tmp_path / "clip.safetensors")
    convert_in(tmp_path / "clip.safetensors", tmp_path / "run", "cumo", heads=4)
    encoder = VisionEncoder(path=str(tmp_path / "run" / "encoder"), features=FeatureSpec(reference=True))
    encoder.configure_model()
    last = encoder.tower.encoder.layers[2]
    with encoder.watch.recording() as records:
        features = encoder(golden["pixel_values"])
    features.square().sum().backward(retain_graph=True)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in last.parameters())
    losses_of(records, 2, routers=6).balance.backward()
    assert last.mlp.gate.weight.grad.any()
    assert last.self_attn.q_proj.weight.grad.any()
    assert last.mlp.experts.up_proj.grad is None
    assert {id(p) for p in last.parameters()} <= {id(p) for p in encoder.parts()["encoder_unread"]}
