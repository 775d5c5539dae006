"""CuMo as a whole: three stages on one another, and together with MoExtend."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import TinyWorld, make_plan, perturb
from safetensors.torch import load_file
from torch import Tensor

from moextend_pl.contracts import TrainPlan, UpcycleSpec, UserError
from moextend_pl.models.base_model import load_base
from moextend_pl.models.delta import save_delta
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.models.tower import FeatureSpec
from moextend_pl.moe.nf4 import NF4Weight
from moextend_pl.runs.fingerprints import frozen_tensors

SPEC = UpcycleSpec(experts=4, top_k=2)
ALL = {"encoder": SPEC, "projector": SPEC, "language": SPEC}
SEEING = {"encoder": SPEC, "projector": SPEC}
EVERYTHING = ("encoder", "projector", "language")


def built(model: MoExtend, parts: Sequence[str] = EVERYTHING) -> MoExtend:
    model.train_plan = TrainPlan(tuple(parts))
    model.configure_model()
    return model.eval()


@torch.no_grad()
def logits(model: MoExtend, world: TinyWorld) -> Tensor:
    batch = world.batch(model, "itii")
    return model.language(batch, model.embed(batch))


def trained(world: TinyWorld, run: Path, parts: Sequence[str] = EVERYTHING, **options: object) -> MoExtend:
    model = built(world.cumo(**options), parts)
    perturb([p for name in parts for p in model.parts()[name]], size=0.05)
    save_delta(model, run)
    return model


@pytest.mark.parametrize("specs", [SEEING, ALL, {"language": SPEC}], ids=["seeing parts", "all parts", "language"])
def test_upcycled_model_equals_the_dense_one_that_was_trained_before(
    tiny_world: TinyWorld, tmp_path: Path, specs: dict[str, UpcycleSpec]
) -> None:
    dense = trained(tiny_world, tmp_path / "dense")
    assert not torch.allclose(logits(dense, tiny_world), logits(built(tiny_world.cumo()), tiny_world), atol=1e-2)
    parts = [*EVERYTHING, *(["routers"] if "language" in specs else [])]
    upcycled = built(tiny_world.cumo(init_from=tmp_path / "dense", **specs), parts)
    for name in specs:
        assert set(getattr(upcycled, name).num_experts.values()) == {4}, name
    expected = logits(dense, tiny_world)
    assert (logits(upcycled, tiny_world) - expected).abs().max() <= 1e-6 * float(expected.abs().max())


def test_stage_after_an_upcycled_one_starts_from_its_experts_and_loads_by_itself(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    parts = (*EVERYTHING, "routers")
    model = trained(tiny_world, tmp_path / "upcycled", parts, **ALL)
    expected = logits(model, tiny_world)
    again = built(tiny_world.cumo(init_from=tmp_path / "upcycled"), parts)
    assert torch.equal(logits(again, tiny_world), expected)
    assert torch.equal(logits(MoExtend.load(tmp_path / "upcycled"), tiny_world), expected)
    other = UpcycleSpec(experts=8)
    with pytest.raises(UserError, match="the encoder is upcycled already"):
        built(tiny_world.cumo(init_from=tmp_path / "upcycled", encoder=other))


def test_delta_of_an_upcycled_part_that_does_not_learn_holds_its_experts(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = built(tiny_world.cumo(**SEEING), ["projector"])
    save_delta(model, tmp_path)
    delta = load_file(tmp_path / "delta.safetensors")
    experts = {name for name, _ in model.named_parameters() if ".experts." in name}
    assert experts <= set(delta)
    assert not any("attn" in name for name in delta)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert not set(manifest["frozen"]) & set(delta)
    assert manifest["model"]["encoder"]["upcycle"]["experts"] == 4
    assert len(frozen_tensors(model)) > len(manifest["frozen"])


def loop_losses(records: list, experts: int) -> tuple[float, float]:
    """Top-1 shares and mean probabilities image by image; mean over images, then over records."""
    balances, zs = [], []
    for record in records:
        images = record.logits.softmax(-1).chunk(record.sequences)
        firsts = record.logits.argmax(-1).chunk(record.sequences)
        values = []
        for probs, first in zip(images, firsts, strict=True):
            shares = [(first == e).float().mean() for e in range(experts)]
            values.append(experts * sum(share * probs[:, e].mean() for e, share in enumerate(shares)))
        balances.append(float(sum(value.detach() for value in values)) / len(values))
        zs.append(float(sum(torch.logsumexp(row, 0) ** 2 for row in record.logits)) / len(record.logits))
    return sum(balances) / len(balances), sum(zs) / len(zs)


def test_loss_is_the_sum_of_cross_entropy_and_the_weighted_losses_of_every_part(tiny_world: TinyWorld) -> None:
    specs = {name: UpcycleSpec(balance=0.3 + n, z=0.2 + n) for n, name in enumerate(ALL)}
    model = built(tiny_world.cumo(**specs), (*EVERYTHING, "routers"))
    perturb([p for name, p in model.named_parameters() if ".gate.weight" in name], size=0.5)
    batch = tiny_world.batch(model, "itii")
    with model.encoder.watch.recording() as tower, model.projector.watch.recording() as projector:
        embedded = model.embed(batch)
    with model.language.watch.recording() as language:
        model.language(batch, embedded)
    output = model(batch)
    assert len(tower) == 2 * 2
    assert {record.sequences for record in tower} == {3, 12}
    expected = output.token
    for n, (name, records) in enumerate((("encoder", tower), ("projector", projector))):
        balance, z = loop_losses(records, 4)
        assert output.router[f"balance_{name}"].item() == pytest.approx(balance, rel=1e-5)
        assert output.router[f"z_{name}"].item() == pytest.approx(z, rel=1e-5)
        expected = expected + (0.3 + n) * balance + (0.2 + n) * z
    real = batch["attention_mask"].bool().flatten()
    shares = [torch.bincount(r.logits[real].argmax(-1), minlength=4) / real.sum() for r in language]
    means = [r.logits[real].softmax(-1).mean(0) for r in language]
    balance = sum(4 * (f * p).sum() for f, p in zip(shares, means, strict=True)) / len(language)
    z = sum(r.logits[real].logsumexp(-1).square().mean() for r in language) / len(language)
    torch.testing.assert_close(output.balance, balance)
    torch.testing.assert_close(output.router["z"], z)
    torch.testing.assert_close(output.loss, expected + 2.3 * balance + 2.2 * z)


def test_text_only_batch_has_no_loss_of_images_and_zero_gradients_for_what_sees(tiny_world: TinyWorld) -> None:
    model = built(tiny_world.cumo(**SEEING))
    output = model(tiny_world.batch(model, "tt"))
    assert output.loss.item() == output.token.item()
    assert all(output.router[name].item() == 0 for name in ("balance_encoder", "z_encoder", "balance_projector"))
    output.loss.backward()
    for name in ("encoder", "projector"):
        for parameter in model.parts()[name]:
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_absent_images_of_a_mixed_batch_change_no_router_loss(tiny_world: TinyWorld) -> None:
    model = built(tiny_world.cumo(**SEEING))
    mixed, alone = (model(tiny_world.batch(model, kinds)).router for kinds in ("itt", "i"))
    assert mixed.keys() == alone.keys()
    for name, value in mixed.items():
        torch.testing.assert_close(value, alone[name])


def test_a_deep_copy_has_the_router_losses_of_its_own_parts(tiny_world: TinyWorld) -> None:
    model = built(tiny_world.cumo(**ALL), (*EVERYTHING, "routers"))
    batch = tiny_world.batch(model, "iti")
    expected, got = model(batch), copy.deepcopy(model)(batch)
    assert set(got.router) == set(expected.router)
    torch.testing.assert_close(got.loss, expected.loss)
    assert expected.loss > expected.token


def test_router_losses_of_a_frozen_tower_are_not_added_and_its_features_are_kept(tiny_world: TinyWorld) -> None:
    model = built(tiny_world.cumo(**SEEING), ["projector"])
    output = model(tiny_world.batch(model, "ii"))
    assert set(output.router) == {"balance_projector", "z_projector"}
    assert len(model.features.features) == 2


def test_dense_base_has_to_be_said_and_a_base_with_experts_is_not_dense(tiny_world: TinyWorld) -> None:
    with pytest.raises(UserError, match="Expected a mixture-of-experts model"):
        MoELanguageModel(base=str(tiny_world.dense)).configure_model()
    for options in ({"dense": True}, {"upcycle": SPEC}):
        with pytest.raises(UserError, match="Expected a dense base"):
            MoELanguageModel(base=str(tiny_world.base), **options).configure_model()


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_cumo_sees_for_an_extended_language_model_that_keeps_its_text(
    tiny_world: TinyWorld, tmp_path: Path, quantize: str | None
) -> None:
    parts = ("encoder", "projector", "new_experts", "new_routers", "calibration")
    model = tiny_world.cumo(dense=False, quantize=quantize, **SEEING)
    model.extension_plan = make_plan(init="copy", routing="masked")
    built(model, parts)
    batch = tiny_world.batch(model, "iti")
    model(batch).loss.backward()
    learning = {name for name in parts for p in model.parts()[name] if p.grad is not None and p.grad.any()}
    assert learning == set(parts)
    perturb([p for name in parts for p in model.parts()[name]], size=0.1)
    text = tiny_world.batch(model, "tt")
    stock = load_base(str(tiny_world.base), quantize).eval()
    with torch.no_grad():
        expected = stock(text["input_ids"], attention_mask=text["attention_mask"]).logits
        assert torch.equal(model.language(text, model.embed(text)), expected)
    save_delta(model, tmp_path)
    assert torch.equal(logits(MoExtend.load(tmp_path), tiny_world), logits(model, tiny_world))


def test_upcycled_tower_and_projector_learn_for_a_dense_base_in_4_bits(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = built(tiny_world.cumo(quantize="nf4", **SEEING), ("encoder", "projector"))
    packed = [name for name, module in model.language.named_modules() if isinstance(module, NF4Weight)]
    assert len(packed) == 2 * (4 + 3)  # four maps of attention and three of the MLP in each of two layers
    twin = built(tiny_world.cumo(**SEEING), ("encoder", "projector"))
    with torch.no_grad():
        for name in packed:
            weight = model.language.get_submodule(name).operand.unpacked(torch.float32)
            twin.language.get_parameter(name).copy_(weight)
    batch = tiny_world.batch(model, "iti")
    losses = []
    for one in (model, twin):
        output = one(batch)
        output.loss.backward()
        losses.append(output.loss.detach())
    torch.testing.assert_close(*losses)
    for name in ("encoder", "projector"):
        for got, expected in zip(model.parts()[name], twin.parts()[name], strict=True):
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-6, rtol=1e-4)
    perturb([p for name in ("encoder", "projector") for p in model.parts()[name]], size=0.1)
    save_delta(model, tmp_path)
    assert torch.equal(logits(MoExtend.load(tmp_path), tiny_world), logits(model, tiny_world))


def test_a_language_model_is_not_both_upcycled_and_in_4_bits(tiny_world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="upcycled experts learn, 4-bit weights do not"):
        tiny_world.cumo(quantize="nf4", language=SPEC)
    trained(tiny_world, tmp_path, (*EVERYTHING, "routers"), **ALL)
    with pytest.raises(UserError, match="upcycled experts learn, 4-bit weights do not"):
        built(tiny_world.cumo(quantize="nf4", init_from=tmp_path), ["projector"])


def test_upcycled_language_model_that_was_trained_is_extended_from_its_experts(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    first = trained(tiny_world, tmp_path, (*EVERYTHING, "routers"), **ALL)
    second = tiny_world.cumo(init_from=tmp_path)
    second.extension_plan = make_plan((0, 1), (2,), init="preserving", routing="open")
    built(second, ("new_experts", "new_routers"))
    blocks = [layer.mlp for layer in second.language.model.model.layers]
    for block, layer in zip(blocks, first.language.model.model.layers, strict=True):
        assert torch.equal(block.experts.new.down_proj[0], layer.mlp.experts.down_proj[2])
    torch.testing.assert_close(logits(second, tiny_world), logits(first, tiny_world), atol=1e-5, rtol=1e-5)


def test_impossible_projectors_and_towers_are_refused(tiny_world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of kind mlp2x_gelu, got kind 'linear'"):
        Projector("linear", upcycle=SPEC)
    with pytest.raises(UserError, match="found none in"):
        VisionEncoder(path=str(tiny_world.encoder), upcycle=SPEC).configure_model()
    with pytest.raises(UserError, match=r"Expected `encoder.features.scales` of whole numbers from 1, got \[0\]"):
        VisionEncoder(path=str(tiny_world.vit), features=FeatureSpec(scales=[0]))
    tower = VisionEncoder(path=str(tiny_world.vit), upcycle=SPEC)
    tower.configure_model()
    tower.save_pretrained(tmp_path)
    again = VisionEncoder(path=str(tmp_path))
    again.configure_model()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(pixels), tower.eval()(pixels))
    with pytest.raises(UserError, match="is upcycled already"):
        VisionEncoder(path=str(tmp_path), upcycle=UpcycleSpec(experts=8))


@torch.no_grad()
def test_scales_stand_side_by_side_and_the_first_is_the_plain_tower(tiny_world: TinyWorld) -> None:
    one, two = (
        VisionEncoder(path=str(tiny_world.vit), features=FeatureSpec(scales=scales)) for scales in ([1], [1, 2])
    )
    for encoder in (one, two):
        encoder.configure_model()
        encoder.eval()
    pixels = torch.randn(2, 3, 32, 32)
    got = two(pixels)
    assert two.channels == 2 * one.channels == got.shape[-1]
    assert got.shape[1] == one.tokens_per_image == two.tokens_per_image
    torch.testing.assert_close(got[..., : one.channels], one(pixels))
