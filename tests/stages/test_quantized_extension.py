"""A stage on a base in 4 bits, from the command line to the loaded result."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import loading_memory
from helpers.stages import ROOT, kill_when, metrics, write_stage
from helpers.tiny_world import TinyWorld, make_plan, tiny_mixtral
from safetensors.torch import load_file

from callbacks.outputs import SavePretrained
from moextend_pl import cli
from moextend_pl.contracts import TrainPlan, UserError
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.fingerprints import frozen_tensors
from moextend_pl.runs.manifest import read_manifest
from moextend_pl.runs.preflight import CHECKPOINT_FOLDER, LAST_CHECKPOINT

QUANTIZE = ("--model.init_args.language.compute.quantize", "nf4")
STEPS = 40


def stage_file(world: TinyWorld, folder: Path, name: str) -> Path:
    make_plan(sources=(1, 2)).save(folder / "plan.yaml")
    return write_stage(world, folder / name, "extend", plan=folder / "plan.yaml", steps=STEPS, every=6)


@pytest.fixture(scope="module")
def run(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An extend stage on a 4-bit base, run to its end."""
    folder = tmp_path_factory.mktemp("quantized")
    cli.run(["fit", "--config", str(stage_file(tiny_world, folder, "run")), *QUANTIZE])
    return folder / "run"


@torch.no_grad()
def test_text_is_answered_as_by_the_same_packed_base_bit_for_bit(run: Path, tiny_world: TinyWorld) -> None:
    loaded, base = MoExtend.load(run), tiny_world.model(parts=(), quantize="nf4")
    assert loaded.language.compute.quantize == "nf4"
    text, images = tiny_world.batch(base, "ttt"), tiny_world.batch(base, "iti")
    assert torch.equal(loaded.language(text), base.language(text))
    got, expected = (m.language(images, m.embed(images)) for m in (loaded, base))
    assert not torch.allclose(got, expected, atol=1e-2)
    unpacked = tiny_world.model(parts=())
    assert not torch.allclose(base.language(text), unpacked.language(text), atol=1e-3)


def test_extension_learns_on_packed_experts(run: Path) -> None:
    losses = [row[0] for row in metrics(run).values()]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(tensor.isfinite().all() for tensor in load_file(run / "delta.safetensors").values())


def test_packed_base_is_in_the_fingerprints_and_in_no_file(run: Path) -> None:
    frozen = read_manifest(run).frozen
    packed = {name for name in frozen if name.endswith(("experts.gate_up_proj.packed", "experts.down_proj.absmax"))}
    assert len(packed) == 6
    assert json.loads((run / "frozen.json").read_text()) == {"unchanged": True, "tensors": len(frozen)}
    saved = torch.load(run / CHECKPOINT_FOLDER / LAST_CHECKPOINT, weights_only=False)["state_dict"]
    assert not [
        name for name in (*saved, *load_file(run / "delta.safetensors")) if "packed" in name or "absmax" in name
    ]


def test_other_bytes_of_the_base_are_noticed(run: Path, tmp_path: Path, tiny_world: TinyWorld) -> None:
    shutil.copytree(run, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["model"]["language"]["base"] = str(tiny_world.base)
    manifest["model"]["encoder"]["path"] = str(tiny_world.encoder)
    name = next(name for name in manifest["frozen"] if name.endswith("down_proj.packed"))
    manifest["frozen"][name] = "0" * 64
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"the base has changed.*down_proj\.packed"):
        MoExtend.load(tmp_path / "run")


def test_table_at_the_start_tells_bytes_by_type(
    tiny_world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    result = cli.run(
        ["fit", "--config", str(stage_file(tiny_world, tmp_path, "run")), *QUANTIZE, "--trainer.max_steps=1"]
    )
    sizes: dict[str, int] = {}
    for p in result.model.parameters():
        kind = str(p.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + p.numel() * p.element_size()
    assert sizes["uint8"] > 10_000
    line = f"by type: float32 {sizes['float32'] / 1e6:.2f} MB, uint8 {sizes['uint8'] / 1e6:.2f} MB"
    assert line in caplog.text


@pytest.mark.slow
def test_killed_stage_ends_as_if_nothing_had_happened(tiny_world: TinyWorld, tmp_path: Path, run: Path) -> None:
    config, cut = stage_file(tiny_world, tmp_path, "run"), tmp_path / "run"

    def has_moved_past_a_checkpoint() -> bool:
        saved = (cut / CHECKPOINT_FOLDER / LAST_CHECKPOINT).exists()
        return saved and len((cut / "metrics.csv").read_text().splitlines()) > 10

    kill_when(config, has_moved_past_a_checkpoint, *QUANTIZE)
    assert not (cut / "stage.json").exists(), "the stage was over before it was killed"
    cli.run(["fit", "--config", str(config), *QUANTIZE])
    assert (cut / "delta.safetensors").read_bytes() == (run / "delta.safetensors").read_bytes()
    assert metrics(cut) == metrics(run)
    assert read_manifest(cut).frozen == read_manifest(run).frozen


def unbuilt(world: TinyWorld, *parts: str) -> MoExtend:
    model = world.unbuilt(quantize="nf4")
    model.train_plan = TrainPlan(parts) if parts else None
    return model


def test_packed_part_cannot_learn_and_routers_can(tiny_world: TinyWorld) -> None:
    refused = unbuilt(tiny_world, "projector", "language")
    with pytest.raises(UserError, match="'language' is held in 4 bits"):
        refused.configure_model()
    assert not hasattr(refused.language, "model"), "refused after the base was read"
    model = unbuilt(tiny_world, "routers")
    model.configure_model()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in model.parts()["routers"]}
    model(tiny_world.batch(model, "it")).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parts()["routers"])


def test_without_a_plan_all_learns_but_the_packed_part(tiny_world: TinyWorld) -> None:
    model = unbuilt(tiny_world)
    model.configure_model()
    learning = {name for name, group in model.parts().items() if group and all(p.requires_grad for p in group)}
    assert learning == {"encoder", "projector", "routers"}
    assert not any(p.requires_grad for p in model.parts()["language"])
    assert {name for name in frozen_tensors(model) if name.endswith(".packed")}


def test_packed_model_that_is_to_be_written_whole_is_refused_at_once(tiny_world: TinyWorld) -> None:
    with pytest.raises(UserError, match="cannot write a 4-bit model"):
        SavePretrained("base").setup(None, tiny_world.unbuilt(quantize="nf4").language, "fit")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of a process as Linux tells it")
def test_loading_never_holds_a_model_that_is_packed_or_shared(tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 512, "num_local_experts": 8, "num_hidden_layers": 24}
    for name, changes in (("small", {}), ("base", wide)):
        tiny_mixtral(**changes).bfloat16().save_pretrained(tmp_path / name, max_shard_size="20MB")
    files = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    assert files > 70e6
    # Freed memory goes back to the system at once, so that what is seen is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    peaks, held = {}, {}
    for asked in ("none", "nf4", "layers", "experts"):
        command = [sys.executable, loading_memory.__file__, str(tmp_path / "small"), str(tmp_path / "base"), asked]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        peaks[asked], held[asked] = map(int, output.split())
    assert peaks["none"] > 1.9 * files, "the meter does not see a model in 32 bits"
    assert held["nf4"] < 0.45 * files
    assert peaks["nf4"] < 0.7 * files
    for share in ("layers", "experts"):  # four processes, of which each holds a quarter
        assert held[share] < 0.7 * files
        assert peaks[share] < 0.8 * files
