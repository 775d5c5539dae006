"""Towers and projectors that compute their activations again: equal gradients, and the bytes that `plan` predicts."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.real_steps import LivePeak, make_step
from helpers.tiny_world import SIDE, TinyWorld, perturb
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import CLIPVisionConfig, CLIPVisionModel

from moextend_pl.contracts import TrainPlan, UpcycleSpec, UserError
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.models.tower import FeatureSpec
from moextend_pl.plan.cost import memory
from moextend_pl.plan.networks import measure_tower

SPEC = UpcycleSpec(experts=4, top_k=2)
EVERYTHING = ("encoder", "projector", "language")
KINDS = ("timm", "transformers")


def clip(folder: Path) -> str:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=8)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    return str(folder)


def unbuilt(world: TinyWorld, folder: Path, kind: str, again: bool) -> MoExtend:
    """Returns CuMo with a tower of timm or of transformers."""
    if kind == "timm":
        return world.cumo(again=again, encoder=SPEC, projector=SPEC)
    tower = VisionEncoder(name=clip(folder), image_size=SIDE, features=FeatureSpec(scales=[1, 2]), upcycle=SPEC)
    language = MoELanguageModel(base=str(world.dense), dense=True)
    projector = Projector(kind="mlp2x_gelu", upcycle=SPEC)
    return MoExtend(encoder=tower, projector=projector, language=language, activation_checkpointing=again)


def step(model: MoExtend, world: TinyWorld, mixed: bool) -> tuple[list[torch.Tensor], int]:
    """Returns loss and gradients of a step, and how many blocks were computed again."""
    model.train_plan = TrainPlan(EVERYTHING)
    model.configure_model()
    perturb([p for name in EVERYTHING for p in model.parts()[name]], size=0.05)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    gates = [module.register_forward_hook(count) for name, module in model.named_modules() if name.endswith(".gate")]
    with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
        loss = model(world.batch(model, "iti")).loss
    forward = calls
    loss.backward()
    for gate in gates:
        gate.remove()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in learning.values())
    return [loss.detach(), *(p.grad for p in learning.values())], calls - forward


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_bits(tiny_world: TinyWorld, tmp_path: Path, kind: str, mixed: bool) -> None:
    (expected, none), (got, again) = (
        step(unbuilt(tiny_world, tmp_path, kind, again), tiny_world, mixed) for again in (False, True)
    )
    # Both scales of each block that is read, and the projector.
    assert (none, again) == (0, 2 * 2 + 1)
    assert all(map(torch.equal, expected, got))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_keeps_under_autocast_what_is_measured_without_values(
    tiny_world: TinyWorld, tmp_path: Path, kind: str
) -> None:
    model = unbuilt(tiny_world, tmp_path, kind, again=False)
    model.train_plan = TrainPlan(EVERYTHING)
    model.configure_model()
    network, _ = measure_tower(model.encoder, torch.bfloat16)
    own = {StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    kept: dict[StorageWeakRef, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage not in own:
            kept[storage] = tensor.untyped_storage().nbytes()
        return tensor

    pixels = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        features = model.encoder.eval()(pixels)
    assert features.requires_grad
    assert 5 * network.saved + network.fixed == pytest.approx(sum(kept.values()), rel=0.01)
    assert network.fixed > 0


def test_what_is_saved_is_predicted(tiny_world: TinyWorld, tmp_path: Path) -> None:
    peaks, predicted = [], []
    for again in (False, True):
        model = partial(unbuilt, tiny_world, tmp_path, "timm", again)
        made = make_step(tiny_world, list(EVERYTHING), torch.float32, model)
        with LivePeak() as peak:
            made.model(made.batch).loss.backward()
        peaks.append(peak.bytes)
        predicted.append(memory(made.shape, made.run).activations)
    assert predicted[0] - predicted[1] == pytest.approx(peaks[0] - peaks[1], rel=0.15)
    assert peaks[1] < 0.8 * peaks[0]


def test_a_tower_without_blocks_is_refused_where_it_learns(tiny_world: TinyWorld) -> None:
    model = tiny_world.unbuilt()
    model.activation_checkpointing, model.train_plan = True, TrainPlan(("encoder",))
    with pytest.raises(UserError, match="Expected a vision transformer for `activation_checkpointing`"):
        model.configure_model()
