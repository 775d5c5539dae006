"""Predicted bytes and operations of CuMo's models, and of layers that are computed again, against a real step."""

from __future__ import annotations

import pytest
import torch
from helpers.real_steps import LivePeak, counter, make_step, measured_bytes
from helpers.tiny_world import TinyWorld, build_tiny_world, tiny_mixtral, tiny_tokenizer
from transformers import MistralConfig, MistralForCausalLM

from moextend_pl.contracts import UpcycleSpec
from moextend_pl.models.base_model import ComputeSpec
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.models.tower import FeatureSpec
from moextend_pl.plan.cost import memory
from moextend_pl.plan.operations import operations

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
EVERYTHING = ["encoder", "projector", "language"]
WITH_ROUTERS = [*EVERYTHING, "routers"]
UPCYCLED = UpcycleSpec(experts=4, top_k=2, balance=0.1, z=0.01)
MODELS = {
    "dense, projector": ({}, ["projector"]),
    "dense, everything": ({}, EVERYTHING),
    "tower and projector upcycled": ({"encoder": UPCYCLED, "projector": UPCYCLED}, EVERYTHING),
    "language model upcycled": ({"language": UPCYCLED}, WITH_ROUTERS),
    "all upcycled": ({"encoder": UPCYCLED, "projector": UPCYCLED, "language": UPCYCLED}, WITH_ROUTERS),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A tiny world whose language models are large enough that activations matter."""
    world = build_tiny_world(tmp_path_factory.mktemp("world"))
    tiny_mixtral(len(tiny_tokenizer()), **SIZES, num_local_experts=8).save_pretrained(world.base)
    dense = MistralConfig(vocab_size=len(tiny_tokenizer()), **SIZES, head_dim=32)
    MistralForCausalLM(dense).save_pretrained(world.dense)
    return world


def cumo(world: TinyWorld, specs: dict[str, UpcycleSpec], recompute: bool = False) -> MoExtend:
    return MoExtend(
        encoder=VisionEncoder(path=str(world.vit), features=FeatureSpec(scales=[1, 2]), upcycle=specs.get("encoder")),
        projector=Projector(kind="mlp2x_gelu", upcycle=specs.get("projector")),
        language=MoELanguageModel(
            base=str(world.dense),
            dense=True,
            upcycle=specs.get("language"),
            compute=ComputeSpec(activation_checkpointing=recompute),
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("specs", "parts"), MODELS.values(), ids=MODELS)
def test_predicted_memory_is_that_of_a_real_step(world, specs, parts, dtype):
    step = make_step(world, parts, dtype, lambda: cumo(world, specs))
    weights, gradients, moments, activations = measured_bytes(step)
    predicted = memory(step.shape, step.run)
    assert (predicted.weights, predicted.gradients, predicted.optimizer) == (weights, gradients, moments)
    assert activations > 0.2 * weights
    assert predicted.activations == pytest.approx(activations, rel=0.04)


@pytest.mark.parametrize(("specs", "parts"), MODELS.values(), ids=MODELS)
def test_predicted_operations_are_those_that_torch_counts(world, specs, parts):
    step = make_step(world, parts, torch.float32, lambda: cumo(world, specs))
    with counter() as counted:
        step.model(step.batch).loss.backward()
    assert operations(step.shape, step.run).total == pytest.approx(counted.get_total_flops(), rel=0.02)


RECOMPUTED = {
    "dense, projector": (lambda world, again: cumo(world, {}, again), ["projector"]),
    "dense, everything": (lambda world, again: cumo(world, {}, again), EVERYTHING),
    "extension": (
        lambda world, again: world.unbuilt(activation_checkpointing=again),
        ["projector", "new_experts", "new_routers", "calibration"],
    ),
}


@pytest.mark.parametrize(("model", "parts"), RECOMPUTED.values(), ids=RECOMPUTED)
def test_layers_computed_again_keep_less_and_do_more_by_what_is_predicted(world, model, parts):
    peaks, kept = [], []
    for again in (False, True):
        step = make_step(world, parts, torch.float32, lambda again=again: model(world, again))
        with LivePeak() as peak:
            step.model(step.batch).loss.backward()
        with counter() as counted:
            step.model(step.batch).loss.backward()
        assert operations(step.shape, step.run).total == pytest.approx(counted.get_total_flops(), rel=0.01)
        peaks.append(peak.bytes)
        kept.append(memory(step.shape, step.run).activations)
    # Other tensors that come and go are in both peaks.
    assert kept[0] - kept[1] == pytest.approx(peaks[0] - peaks[1], rel=0.1)
    assert peaks[1] < 0.6 * peaks[0]
