"""Every stage file of `configs/` builds its model, data and callbacks, and takes its first steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from helpers.recipes import lay_out_cumo
from helpers.tiny_world import TinyWorld, make_plan
from lightning.pytorch import Trainer

from datamodules.image_text import ImageTextShards
from moextend_pl import cli
from moextend_pl.checkpoint import save_delta
from moextend_pl.stage import StageModule
from moextend_pl.stage_cli import MoExtendCLI

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = sorted(path for path in CONFIGS.rglob("*.yaml") if "model" in (yaml.safe_load(path.read_text()) or {}))
# Layers that no one starts, because they name no run directory.
RUNNABLE = [path for path in STAGES if "default_root_dir" in yaml.safe_load(path.read_text()).get("trainer", {})]
SMALL = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"]
SMALL += ["--data.init_args.batch_size", "4", "--data.init_args.num_workers", "0", "--trainer.accelerator", "cpu"]


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.fixture
def quickstart(tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the earlier stages of the quickstart seem to be done, at tiny size."""
    root = tmp_path / "runs" / "quickstart"
    shutil.copytree(tiny_world.base, root / "0_language" / "base")
    shutil.copytree(tiny_world.encoder, root / "0_vision" / "encoder")
    shutil.copytree(tiny_world.base, root / "data" / "tokenizer")
    for name, source in (("vqa", "vqa"), ("captions", "vqa"), ("text", "text")):
        for split, copied in (("train", "train"), ("val", "test"), ("test", "test")):
            shutil.copytree(tiny_world.data(source, copied), root / "data" / name / split)
    save_delta(tiny_world.model(parts=["projector"]), root / "1_align")
    (root / "2_probe").mkdir()
    make_plan().save(root / "2_probe" / "extension_plan.yaml")
    monkeypatch.chdir(tmp_path)
    lay_out_cumo(tiny_world, tmp_path)
    return root


def fit(path: Path, run: Path) -> MoExtendCLI:
    done = cli.run(["fit", "--config", str(path), "--trainer.default_root_dir", str(run), *SMALL])
    assert isinstance(done, MoExtendCLI)
    return done


def test_discovery_finds_the_stages_of_the_quickstart() -> None:
    names = {path.stem for path in RUNNABLE if path.parent.name == "easy_vqa"}
    assert {"0_vision", "0_language", "1_align", "2_probe", "3_extend", "full_finetune"} <= names


@pytest.mark.parametrize("path", STAGES, ids=name_of)
def test_config_builds_everything_it_names(path: Path, quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda self, *args, **kwargs: None)
    built = fit(path, quickstart / "other")
    assert isinstance(built.model, StageModule)
    assert isinstance(built.datamodule, ImageTextShards)
    text = yaml.safe_load(path.read_text())
    wanted = [item["class_path"].rsplit(".", 1)[-1] for item in text.get("trainer", {}).get("callbacks+", [])]
    assert {*wanted, "StageCheckpoint"} <= {type(item).__name__ for item in built.trainer.callbacks}
    assert built.model.sample_spec().image_token_id > 0


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_config_takes_its_steps_and_writes_its_outputs(path: Path, quickstart: Path) -> None:
    done = fit(path, quickstart / "other")
    assert done.trainer.global_step == 2
    receipt = [c for c in done.trainer.callbacks if type(c).__name__ == "StageReceipt"]
    assert len(receipt) == 1
    assert all((quickstart / "other" / name).exists() for name in ["stage.json", *receipt[0].outputs])
