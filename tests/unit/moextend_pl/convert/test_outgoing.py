"""Runs that were trained here go to the published layouts and come in again as the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.published import LAYERS, SIDE, VISION, clip_tensors, convert, projector_tensors
from helpers.tiny_world import TinyWorld, perturb
from transformers import CLIPVisionConfig, CLIPVisionModel

from moextend_pl.contracts import TrainPlan, UpcycleSpec, UserError
from moextend_pl.convert.files import TensorFiles
from moextend_pl.models.delta import encoder_arguments, save_delta
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector

SPEC = UpcycleSpec(experts=4, top_k=1, balance=0.2, z=0.03)
SIZES = {"hidden_size": VISION, "intermediate_size": 12, "num_hidden_layers": LAYERS, "num_attention_heads": 2}


def save_clip(folder: Path, **changes: object) -> None:
    torch.manual_seed(4)
    config = CLIPVisionConfig(**{**SIZES, "image_size": SIDE, "patch_size": 4, "hidden_act": "quick_gelu", **changes})
    CLIPVisionModel(config).save_pretrained(folder)


def train(world: TinyWorld, run: Path, tower: dict, spec: UpcycleSpec | None = SPEC, **changes: object) -> MoExtend:
    """A run as the recipes of CuMo make it: all parts learn, then the delta is saved."""
    model = MoExtend(
        encoder=VisionEncoder(
            **encoder_arguments({**tower, "image_size": SIDE, "scales": [1, 2], "upcycle": spec, **changes})
        ),
        projector=Projector(upcycle=spec),
        language=MoELanguageModel(base=str(world.dense), dense=True),
    )
    parts = ("encoder", "projector", "language")
    model.train_plan = TrainPlan(parts)
    model.configure_model()
    perturb([p for name in parts for p in model.parts()[name]], size=0.1)
    save_delta(model, run)
    return model.eval()


@pytest.fixture
def write_seeing() -> Callable:
    def write(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
        draw = torch.Generator().manual_seed(0)
        makes = {
            "clip.bin": clip_tensors(draw, 4, "vision_model."),
            "mm_projector.bin": projector_tensors(draw, 4, "model.mm_projector.", 2),
        }
        folder.mkdir()
        for file, tensors in makes.items():
            torch.save(tensors, folder / file)
        return makes

    return write


TOWERS = ["name", "path", "some layers", "dense"]


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_trained_run_goes_back_and_comes_in_again_as_the_same_model(
    tiny_world: TinyWorld, kind: str, tmp_path: Path
) -> None:
    if kind == "path":
        torch.save(clip_tensors(torch.Generator().manual_seed(0), 0, "vision_model."), tmp_path / "clip.bin")
        convert("cumo", tmp_path / "clip.bin", tmp_path / "converted", "--heads", "2")
        tower = {"path": str(tmp_path / "converted" / "encoder")}
    else:
        save_clip(tmp_path / "clip")
        tower = {"name": str(tmp_path / "clip")}
    spec = {"dense": None, "some layers": UpcycleSpec(experts=4, top_k=1, layers=(0,))}.get(kind, SPEC)
    model = train(tiny_world, tmp_path / "run", tower, spec)
    convert("cumo", tmp_path / "run", tmp_path / "back", "--back")
    experts = [name for name in TensorFiles(tmp_path / "back") if ".experts.3.fc1.weight" in name]
    assert len(experts) == (0 if kind == "dense" else LAYERS)
    convert("cumo", tmp_path / "back", tmp_path / "again", "--heads", "2")
    again = MoExtend.load(tmp_path / "again")
    pixels, ids = torch.randn(2, 3, SIDE, SIDE), torch.tensor([[3, 7, 9, 1]])
    expected = model.projector(model.encoder(pixels))
    torch.testing.assert_close(again.projector(again.encoder(pixels)), expected)
    torch.testing.assert_close(again.language.model(ids).logits, model.language.model(ids).logits)
    if kind == "name":
        written = again.encoder.upcycle_spec
        assert written is not None
        assert (written.balance, written.z) == (SPEC.balance, SPEC.z)


@pytest.mark.parametrize("wrong", [{"hidden_act": "gelu"}, {"layer": -1}, {"pool": 2}], ids=str)
def test_tower_that_computes_otherwise_than_the_published_one_is_refused(
    tiny_world: TinyWorld, wrong: dict, tmp_path: Path
) -> None:
    activation = {name: wrong[name] for name in wrong if name == "hidden_act"}
    save_clip(tmp_path / "clip", **activation)
    options = {name: wrong[name] for name in wrong if name != "hidden_act"}
    train(tiny_world, tmp_path / "run", {"name": str(tmp_path / "clip")}, **options)
    with pytest.raises(UserError, match="expected a tower whose model, activation, `layer` and `pool` are"):
        convert("cumo", tmp_path / "run", tmp_path / "back", "--back")
    assert not (tmp_path / "back").exists()


def test_tower_and_projector_without_a_language_model_go_back_to_a_file_each(
    write_seeing: Callable, tmp_path: Path
) -> None:
    tensors = write_seeing(tmp_path / "published")
    convert("cumo", tmp_path / "published", tmp_path / "run", "--heads", "2")
    convert("cumo", tmp_path / "run", tmp_path / "back", "--back")
    for file, expected in tensors.items():
        back = torch.load(tmp_path / "back" / file, weights_only=True)
        assert set(back) == set(expected)
        assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())
