"""Delta and manifest: what a run leaves behind, and what refuses to be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import TinyWorld, make_plan, perturb
from safetensors.torch import load_file, save_file

from moextend_pl.contracts import UserError
from moextend_pl.models.delta import load_delta, save_delta
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.fingerprints import file_sha256, fingerprints, tensor_sha256
from moextend_pl.runs.manifest import Manifest, read_manifest

PARTS = ("projector", "new_experts", "new_routers", "calibration")


def test_fingerprint_sees_value_type_and_shape() -> None:
    value = torch.arange(6.0)
    digests = [value, value.reshape(2, 3), value.bfloat16(), value + 1e-6, -value, value.clone()]
    got = [tensor_sha256(v) for v in digests]
    assert len(set(got)) == 5
    assert got[0] == got[-1]
    assert tensor_sha256(torch.tensor(0.0)) != tensor_sha256(torch.tensor(-0.0))
    assert tensor_sha256(value.reshape(2, 3).T) == tensor_sha256(value.reshape(2, 3).T.contiguous())


def test_names_of_wrapped_tensors_are_those_of_the_base() -> None:
    assert set(fingerprints({"a.gate.base.weight": torch.ones(1), "b.weight": torch.ones(1)})) == {
        "a.gate.weight",
        "b.weight",
    }


@pytest.fixture
def world(tiny_world: TinyWorld, tmp_path: Path) -> TinyWorld:
    """A copy of the world that a test may damage."""
    shutil.copytree(tiny_world.root, tmp_path / "world")
    return TinyWorld(tmp_path / "world")


@pytest.fixture
def saved(world: TinyWorld, tmp_path: Path) -> tuple[MoExtend, Path]:
    """A trained model and its run directory."""
    model = world.model(make_plan(sources=(1, 1)), PARTS)
    perturb([p for name in PARTS for p in model.parts()[name]])
    save_delta(model, tmp_path / "run")
    return model, tmp_path / "run"


@torch.no_grad()
def test_loaded_model_gives_bit_identical_outputs(saved: tuple[MoExtend, Path], world: TinyWorld) -> None:
    model, run = saved
    loaded = MoExtend.load(run)
    batch = world.batch(model, "itti")
    assert torch.equal(loaded.language(batch, loaded.embed(batch)), model.language(batch, model.eval().embed(batch)))
    prompts = world.batch(model, "itti", generation=True)
    assert loaded.answer(prompts) == model.answer(prompts)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_delta_holds_only_new_weights(saved: tuple[MoExtend, Path]) -> None:
    model, run = saved
    delta = load_file(run / "delta.safetensors")
    new = {id(p) for name in PARTS for p in model.parts()[name]}
    assert set(delta) == {name for name, p in model.named_parameters() if id(p) in new}
    parameters = dict(model.named_parameters())
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in delta.items())


def test_manifest_names_what_learned_and_fingerprints_the_rest(saved: tuple[MoExtend, Path], world: TinyWorld) -> None:
    model, run = saved
    manifest = read_manifest(run)
    assert set(manifest.trained) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert manifest.plans == (make_plan(sources=(1, 1)),)
    stock = {f"language.model.{n}": tensor_sha256(p) for n, p in world.stock().named_parameters()}
    tower = load_file(world.encoder / "encoder.safetensors")
    assert any("running_mean" in name for name in tower)
    stock |= {f"encoder.tower.{n}": tensor_sha256(t) for n, t in tower.items()}
    assert manifest.frozen == stock
    assert manifest.delta_sha256 == file_sha256(run / "delta.safetensors")


def test_delta_of_a_full_fine_tune_holds_the_base_too(world: TinyWorld, tmp_path: Path) -> None:
    model = world.model(parts=["projector", "language", "routers"])
    perturb(model.parts()["language"] + model.parts()["routers"])
    save_delta(model, tmp_path / "run")
    assert not any(name.startswith("encoder") for name in load_file(tmp_path / "run" / "delta.safetensors"))
    loaded = MoExtend.load(tmp_path / "run")
    batch = world.batch(model, "it")
    with torch.no_grad():
        got, expected = loaded.language(batch, loaded.embed(batch)), model.language(batch, model.embed(batch))
    assert torch.equal(got, expected)


def test_run_and_base_can_be_moved_together(saved: tuple[MoExtend, Path], tmp_path: Path) -> None:
    _, _run = saved
    (tmp_path / "elsewhere").mkdir()
    for name in ("world", "run"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    MoExtend.load(tmp_path / "elsewhere" / "run")


class Killed(BaseException):
    """Ends what it is raised in, as a kill would."""


@pytest.mark.parametrize("point", ["before the delta", "before the manifest", "before the rename"])
def test_row_3_a_run_killed_anywhere_between_delta_and_manifest_leaves_a_pair(
    saved: tuple[MoExtend, Path], world: TinyWorld, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    model, run = saved
    before = [p.clone() for p in model.parameters()]
    perturb(model.parts()["projector"], seed=9)
    after = [p.clone() for p in model.parameters()]
    replace = Path.replace

    def die(self: Path, target: Path) -> Path:
        names = {"before the delta": "delta.new.safetensors", "before the manifest": "manifest.json"}
        if Path(target).name == names.get(point, "delta.safetensors"):
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(Killed):
            save_delta(model, run)
    expected = after if point == "before the rename" else before
    loaded = list(MoExtend.load(run).parameters())
    assert all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=True))
    # Killed a second time while it writes the next delta, and then not: neither loses the pair that is there.
    perturb(model.parts()["projector"], seed=10)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            save_delta(model, run)
    loaded = list(MoExtend.load(run).parameters())
    assert all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=True))
    save_delta(model, run)
    assert sorted(path.name for path in run.iterdir()) == ["delta.safetensors", "manifest.json"]
    assert all(torch.equal(a, b) for a, b in zip(MoExtend.load(run).parameters(), model.parameters(), strict=True))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def change_manifest(**changes: object) -> Callable[[Path, TinyWorld], None]:
    def change(run: Path, _: TinyWorld) -> None:
        data = json.loads((run / "manifest.json").read_text())
        (run / "manifest.json").write_text(json.dumps({**data, **changes}))

    return change


def change_argument(part: str, **changes: object) -> Callable[[Path, TinyWorld], None]:
    def change(run: Path, world: TinyWorld) -> None:
        model = json.loads((run / "manifest.json").read_text())["model"]
        change_manifest(model={**model, part: {**model[part], **changes}})(run, world)

    return change


def other_plan(run: Path, world: TinyWorld) -> None:
    change_manifest(plans=[make_plan([1], (1, 1)).to_dict()])(run, world)


DAMAGES = {
    "delta with a flipped byte": (lambda run, _: flip_a_byte(run / "delta.safetensors"), "missing or damaged"),
    "no delta": (lambda run, _: (run / "delta.safetensors").unlink(), "missing or damaged"),
    "delta cut short": (
        lambda run, _: (run / "delta.safetensors").write_bytes((run / "delta.safetensors").read_bytes()[:-9]),
        "missing or damaged",
    ),
    "no manifest": (lambda run, _: (run / "manifest.json").unlink(), r"found no manifest\.json"),
    "manifest of another schema": (change_manifest(schema=7), "expected schema 2, got 7"),
    "manifest cut short": (lambda run, _: (run / "manifest.json").write_text('{"schema": 2, "pl'), "manifest.json"),
    "manifest that is no text": (lambda run, _: (run / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json: dam"),
    "manifest that is a list": (lambda run, _: (run / "manifest.json").write_text("[]"), "manifest.json: damaged"),
    "plans that are a number": (change_manifest(plans=5), "manifest.json: damaged"),
    "model that is a number": (change_manifest(model=5), "manifest.json: damaged"),
    "manifest of an unknown dtype": (change_manifest(dtype="float17"), "damaged .*`dtype` 'float17' is no type"),
    "manifest of a dtype that is none": (change_manifest(dtype="nn"), "damaged .*`dtype` 'nn' is no type"),
    "manifest of a dtype that is a number": (change_manifest(dtype=16), "damaged .*`dtype` 16 is no type"),
    "manifest with numbers for digests": (change_manifest(frozen={"a": 1}), "damaged .*are no texts"),
    "manifest with a number for a folder": (
        change_argument("language", base=5),
        "damaged .*`language` names no folder",
    ),
    "manifest without a folder": (change_argument("encoder", path=None), "damaged .*`encoder` names no folder"),
    "manifest with a number for a tokenizer": (change_argument("language", tokenizer=5), "damaged .*are no places"),
    "manifest with an unknown argument": (change_argument("projector", more=5), "manifest does not fit this version"),
    "manifest without its keys": (lambda run, _: (run / "manifest.json").write_text('{"schema": 2}'), "manifest.json"),
    "plan of other layers": (other_plan, "tensors do not fit this model"),
    "plan that is none": (change_manifest(plans=[{"schema": 1}]), "not a valid extension plan"),
    "changed language model": (lambda _, world: flip_a_byte(world.base / "model.safetensors"), "the base has changed"),
    "changed tower": (lambda _, world: flip_a_byte(world.encoder / "encoder.safetensors"), "the base has changed"),
    "no language model": (lambda _, world: shutil.rmtree(world.base), r"found no config\.json"),
    "no tower": (lambda _, world: shutil.rmtree(world.encoder), "Expected a vision encoder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_mistake(saved: tuple[MoExtend, Path], world: TinyWorld, damage: str) -> None:
    _, run = saved
    spoil, message = DAMAGES[damage]
    spoil(run, world)
    with pytest.raises(UserError, match=message) as caught:
        MoExtend.load(run)
    assert "\n" not in str(caught.value)


def test_stage_that_starts_from_an_unfinished_run_is_refused_when_it_is_set_up(
    world: TinyWorld, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="Run that stage to its end first"):
        world.unbuilt(init_from=tmp_path)


def test_next_stage_starts_from_the_weights_of_the_one_before(world: TinyWorld, tmp_path: Path) -> None:
    aligned = world.model(parts=["projector"])
    perturb(aligned.parts()["projector"])
    save_delta(aligned, tmp_path / "align")
    extended = world.unbuilt(init_from=tmp_path / "align")
    extended.extension_plan = make_plan()
    extended.configure_model()
    assert torch.equal(extended.projector.layers[0].weight, aligned.projector.layers[0].weight)
    assert extended.parts()["new_experts"]


def test_run_without_a_plan_of_its_own_goes_on_with_the_earlier_one(
    saved: tuple[MoExtend, Path], world: TinyWorld
) -> None:
    model, run = saved
    other = world.unbuilt(init_from=run)
    other.configure_model()
    assert other.plans == model.plans
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_delta_that_does_not_fit_changes_nothing(saved: tuple[MoExtend, Path], world: TinyWorld) -> None:
    _, run = saved
    delta = load_file(run / "delta.safetensors")
    save_file({**delta, "unknown": torch.ones(1)}, run / "delta.safetensors")
    change_manifest(delta_sha256=file_sha256(run / "delta.safetensors"))(run, world)
    model = world.model(make_plan(sources=(1, 1)))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match="for example unknown"):
        load_delta(model, run)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
