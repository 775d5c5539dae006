"""Every stage file of `configs/` builds its model, data and callbacks, and takes its first steps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.distilled import lay_out_distillation
from helpers.recipes import lay_out_cumo
from helpers.tiny_gguf import tiny_llama, write_gguf
from helpers.tiny_world import TinyWorld, make_plan
from lightning.pytorch import Trainer
from transformers import AutoConfig, AutoModel

from datamodules.image_text import ImageTextShards
from moextend_pl import cli
from moextend_pl.cli.stage import MoExtendCLI
from moextend_pl.cli.stage_parser import plain_config
from moextend_pl.contracts import TrainPlan
from moextend_pl.models.delta import save_delta
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.models.tower import PREPROCESSOR_FILE, FeatureSpec
from moextend_pl.training.half_precision import default_dtype
from moextend_pl.training.stage import StageModule

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = sorted(path for path in CONFIGS.rglob("*.yaml") if "model" in (yaml.safe_load(path.read_text()) or {}))
# Layers that no one starts, because they name no run directory.
RUNNABLE = [path for path in STAGES if "default_root_dir" in yaml.safe_load(path.read_text()).get("trainer", {})]
SMALL = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"]
SMALL += [
    "--data.init_args.batch_size",
    "4",
    "--data.init_args.reading.num_workers",
    "0",
    "--trainer.accelerator",
    "cpu",
]
SMALL += ["--trainer.accumulate_grad_batches", "1"]
FULL_SIZE = sorted(path.parent for path in CONFIGS.glob("*/recipe.yaml"))
SMOLLM2 = Path("runs/smollm2/weights/SmolLM2-135M-Instruct.Q4_1.gguf")
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def lay_out_quickstart(tiny_world: TinyWorld) -> None:
    """Writes what the earlier stages of the quickstart seem to have left in the working directory, at tiny size."""
    root = Path.cwd() / "runs" / "quickstart"
    shutil.copytree(tiny_world.base, root / "0_language" / "base")
    shutil.copytree(tiny_world.encoder, root / "0_vision" / "encoder")
    shutil.copytree(tiny_world.base, root / "data" / "tokenizer")
    for name, source in (("vqa", "vqa"), ("captions", "vqa"), ("text", "text")):
        for split, copied in (("train", "train"), ("val", "test"), ("test", "test")):
            shutil.copytree(tiny_world.data(source, copied), root / "data" / name / split)
    save_delta(tiny_world.model(parts=["projector"]), root / "1_align")
    (root / "2_probe").mkdir()
    make_plan().save(root / "2_probe" / "extension_plan.yaml")
    lay_out_distillation(tiny_world, root)
    (root.parent / "scenes").symlink_to("quickstart")  # the same stages on another data set
    (root.parent / "smollm2").symlink_to("quickstart")  # and of another base, which is a file
    SMOLLM2.parent.mkdir(parents=True)
    write_gguf(tiny_llama(), SMOLLM2)
    for split, copied in (("train", "train"), ("val", "test")):
        shutil.copytree(tiny_world.data("text", copied), root / "texts" / split)
    dense = MoExtend(
        encoder=VisionEncoder(path=str(tiny_world.encoder)),
        projector=Projector(kind="mlp2x_gelu"),
        language=MoELanguageModel(base=str(SMOLLM2), dense=True),
    )
    dense.train_plan = TrainPlan(("projector",))
    with default_dtype(torch.bfloat16):
        dense.configure_model()
    save_delta(dense.to(torch.bfloat16), root / "1_align_dense")


def lay_out_full_size(tiny_world: TinyWorld) -> None:
    """Writes tiny models, shards and earlier stages into the folders that the full-size recipes name."""
    for recipe in FULL_SIZE:
        arguments = yaml.safe_load((recipe / "recipe.yaml").read_text())["model"]["init_args"]
        tower, base = Path(arguments["encoder"]["name"]), Path(arguments["language"]["base"])
        shutil.copytree(tiny_world.base, base)
        config = AutoConfig.from_pretrained(recipe / "tower", **TOWER)
        AutoModel.from_config(config).save_pretrained(tower)
        (tower / PREPROCESSOR_FILE).write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}')
        model = MoExtend(
            encoder=VisionEncoder(
                **{**arguments["encoder"], "features": FeatureSpec(**arguments["encoder"]["features"])}
            ),
            projector=Projector(**arguments["projector"]),
            language=MoELanguageModel(base=str(base)),
        )
        model.train_plan = TrainPlan(("projector",))
        model.configure_model()
        runs = Path("runs") / recipe.name
        save_delta(model, runs / "1_align")
        (runs / "2_probe").mkdir()
        make_plan().save(runs / "2_probe" / "extension_plan.yaml")
    for name in ("llava_558k", "llava_665k"):
        for split, copied in (("train", "train"), ("val", "test")):
            shutil.copytree(tiny_world.data("mixed", copied), Path("shards") / name / split)


@pytest.fixture(scope="module")
def laid_out(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the earlier stages of every recipe seem to be done; read-only."""
    root = tmp_path_factory.mktemp("laid_out")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        lay_out_quickstart(tiny_world)
        lay_out_cumo(tiny_world, root)
        lay_out_full_size(tiny_world)
    return root


@pytest.fixture
def workplace(laid_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A working directory in which they seem to be done, with hard links to the same files; its quickstart."""
    shutil.copytree(laid_out, tmp_path, symlinks=True, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if "smollm2_135m" in request.node.name:  # some of them read a file that is unpacked
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "runs" / "quickstart"


def fit(path: Path, run: Path) -> MoExtendCLI:
    done = cli.run(["fit", "--config", str(path), "--trainer.default_root_dir", str(run), *SMALL])
    assert isinstance(done, MoExtendCLI)
    return done


@pytest.mark.parametrize("recipe", ["easy_vqa", "scenes", "smollm2_135m"])
def test_discovery_finds_the_stages(recipe: str) -> None:
    names = {path.stem for path in RUNNABLE if path.parent.name == recipe}
    assert {"0_vision", "0_language", "1_align", "2_probe", "3_extend"} <= names


def test_discovery_finds_the_stages_of_the_full_size_recipes() -> None:
    assert {"mixtral_8x7b", "qwen3_30b_a3b", "olmoe_1b_7b"} <= {folder.name for folder in FULL_SIZE}
    for folder in FULL_SIZE:
        assert {"1_align", "2_probe", "3_extend"} <= {path.stem for path in RUNNABLE if path.parent == folder}


@pytest.mark.parametrize("path", STAGES, ids=name_of)
def test_config_builds_everything_it_names(path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda self, *args, **kwargs: None)
    built = fit(path, workplace / "other")
    assert isinstance(built.model, StageModule)
    assert isinstance(built.datamodule, ImageTextShards)
    text = yaml.safe_load(path.read_text())
    wanted = [item["class_path"].rsplit(".", 1)[-1] for item in text.get("trainer", {}).get("callbacks+", [])]
    assert {*wanted, "StageCheckpoint"} <= {type(item).__name__ for item in built.trainer.callbacks}
    assert built.model.sample_spec().image_token_id > 0


QUICK = {f"easy_vqa/{stage}.yaml" for stage in ("1_align", "2_probe", "3_extend", "cumo/3_instruction")}


def slow_but_for_some(path: Path) -> object:
    """A run takes seconds; one of each kind of stage is tried quickly."""
    name = name_of(path)
    return pytest.param(path, id=name, marks=[] if name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("path", [slow_but_for_some(path) for path in RUNNABLE])
def test_config_that_a_run_writes_starts_the_same_run(
    path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[dict[str, Any]] = []

    def settle(self: MoExtendCLI) -> None:
        written.append(plain_config(self.config[str(self.subcommand)]))
        self.config_init = self.config

    monkeypatch.setattr(MoExtendCLI, "instantiate_classes", settle)
    monkeypatch.setattr(MoExtendCLI, "_run_subcommand", lambda *_: None)

    def settled(command: str, config: str | Path) -> dict[str, Any]:
        cli.run([command, "--config", str(config)])
        return written[-1]

    def write(settings: dict[str, Any]) -> str:
        Path("written.yaml").write_text(yaml.safe_dump(settings))
        assert " at 0x" not in Path("written.yaml").read_text()
        return "written.yaml"

    fit, test = settled("fit", path), settled("test", path)
    assert settled("fit", write(fit)) == fit
    assert settled("test", write(fit)) == test  # a run is tested with what it was trained with
    assert settled("test", write(test)) == test
    capsys.readouterr()
    assert cli.run(["fit", "--config", str(path), "--print_config"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert settled("fit", "printed.yaml") == fit


@pytest.mark.parametrize("path", [slow_but_for_some(path) for path in RUNNABLE])
def test_config_takes_its_steps_and_writes_its_outputs(path: Path, workplace: Path) -> None:
    done = fit(path, workplace / "other")
    assert done.trainer.global_step == 2
    receipt = [c for c in done.trainer.callbacks if type(c).__name__ == "StageReceipt"]
    assert len(receipt) == 1
    assert all((workplace / "other" / name).exists() for name in ["stage.json", *receipt[0].outputs])
