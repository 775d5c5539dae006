"""The command makes a whole folder with its card, or none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.tiny_world import TinyWorld, make_plan

from moextend_pl import cli
from moextend_pl.models.delta import save_delta

PARTS = ("projector", "new_experts", "new_routers", "calibration")


@pytest.fixture
def run(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    """A finished run, with what runs leave beside their delta."""
    save_delta(tiny_world.model(make_plan(), parts=PARTS), tmp_path / "run")
    data = {"init_args": {"train": "/home/me/secret/data/train", "val": None}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    (tmp_path / "run" / "metrics.csv").write_text("step,train/loss,val/loss,lr\n1,2.5,,1\n2,1.5,,1\n2,,0.75,\n")
    (tmp_path / "run" / "frozen.json").write_text('{"unchanged": true, "tensors": 78}')
    (tmp_path / "run" / "plots").mkdir()
    (tmp_path / "run" / "plots" / "usage.png").write_bytes(b"\x89PNG")
    return tmp_path / "run"


def test_folder_has_model_processor_and_card(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "hf"
    assert cli.main(["export", str(run), "--target", "hf", "--out", str(out)]) == 0
    names = ("config.json", "generation_config.json", "model.safetensors", "processor_config.json")
    for name in (*names, "chat_template.jinja", "tokenizer.json", "README.md", "plots/usage.png"):
        assert (out / name).stat().st_mode == (out / "config.json").stat().st_mode, name
    _, front, card = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "image-text-to-text"
    for text in (
        "layer 2: new experts from 1",
        "`data/train`",
        "| train/loss | 1.5 |",
        "| val/loss | 0.75 |",
        "all 78 frozen tensors",
        "plots/usage.png",
        "2408.03511",
    ):
        assert text in card
    assert "secret" not in card
    assert [path.name for path in out.parent.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("taken", "sentence"),
    [("file", "which is a file"), ("folder", "which has files"), (None, "found no manifest.json")],
)
def test_mistakes_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], taken: str | None, sentence: str
) -> None:
    out = tmp_path / "out"
    if taken == "folder":
        out.mkdir()
    if taken:
        (out / "a" if taken == "folder" else out).write_text("mine")
    assert cli.main(["export", str(tmp_path / "no_run"), "--out", str(out)]) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if taken else [])


def test_import_of_the_package_stays_cheap() -> None:
    code = "import sys, moextend_pl\nsys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--shard", "5XB"], "Expected --shard such as 5GB or 500MB, got '5XB'"),
        (["--tower", "org/tower"], "--tower says nothing for `--target hf`"),
        (["--target", "delta", "--task", "b"], "--task says nothing for `--target delta`"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out"), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
