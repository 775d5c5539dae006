"""From a folder of pictures to an extended model, by one command that can be stopped, edited and run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.loopback_hub import COMMIT, loopback_hub
from helpers.timm_towers import published
from helpers.tiny_world import SAMPLES, TinyWorld, colour_of, picture

import moextend_pl
from moextend_pl import cli
from moextend_pl.cli.config_files import prepare_arguments
from moextend_pl.contracts import UserError
from moextend_pl.extend.command import options_parser
from moextend_pl.extend.next_steps import next_steps
from moextend_pl.extend.own_data import count_samples, make_shards, state_of
from moextend_pl.extend.stage_files import STAGES, Wish, stage_files
from moextend_pl.extend.stages import steps_of, write_stages
from moextend_pl.runs.named import name_of

SHORT = ["--trainer.max_steps=4", "--trainer.val_check_interval=4"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder for each colour."""
    for number in range(SAMPLES):
        path = tmp_path / "pictures" / colour_of(number) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return tmp_path / "pictures"


@pytest.fixture
def asked(tiny_world: TinyWorld, pictures: Path, tmp_path: Path) -> list[str]:
    """The command of a stranger."""
    models = ["--base", str(tiny_world.base), "--tower", str(tiny_world.encoder)]
    data = ["--data", str(pictures), "--question", "what is the color ?"]
    return ["extend", *models, *data, "--out", str(tmp_path / "run"), "--batch-size", "4"]


def wish(**changes: object) -> Wish:
    folders = {name: Path(name) for name in ("out", "base", "tower", "train", "val")}
    facts = {
        "is_saved_tower": False,
        "samples": 1000,
        "width": 64,
        "batch": 8,
        "epochs": 2.0,
        "precision": "32-true",
        "length": 99,
    }
    return Wish(**{**folders, **facts, **changes})


def test_stage_files_are_read_as_they_are_meant(tmp_path: Path) -> None:
    texts = stage_files(wish(out=Path("a: 'b' #c"), width=4096))
    data = {name: yaml.safe_load(text) for name, text in texts.items()}
    assert data["1_align.yaml"]["trainer"]["default_root_dir"] == "a: 'b' #c/1_align"
    assert [data[f"{name}.yaml"]["trainer"]["max_steps"] for name in STAGES] == [250, 62, 250]
    assert data["3_extend.yaml"]["model"]["init_args"]["optim"]["lr"] == 2e-5
    assert data["model.yaml"]["model"]["init_args"]["encoder"] == {"name": "tower"}
    for name, text in texts.items():
        assert max(map(len, text.splitlines())) <= 120
        (tmp_path / name).write_text(text)
    names = [path.name for path in prepare_arguments(["fit", "--config", str(tmp_path / "2_probe.yaml")]).files]
    assert names == ["base.yaml", "model.yaml", "2_probe.yaml"]


@pytest.mark.slow
def test_pictures_become_an_extended_model_and_an_edited_stage_starts_anew(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main([*asked, *SHORT]) == 0
    assert f"python -m moextend_pl generate --checkpoint {run}/3_extend" in capsys.readouterr().out
    model = moextend_pl.load(run / "3_extend")
    assert model.plans[0].layers
    assert isinstance(model.generate(tmp_path / "pictures" / "red" / "0.png", "what is the color ?"), str)
    assert (run / "report.html").is_file()
    assert next_steps(run)[2][1].endswith(f"evaluate {run}/3_extend --tasks own --data {run}/data")
    held = json.loads((run / "data/val/index.json").read_text())["shards"][0]["samples"]
    assert 0 < held < SAMPLES / 2
    receipts = {name: (run / name / "stage.json").stat().st_mtime_ns for name in STAGES}
    assert cli.main([*asked, *SHORT]) == 0  # nothing is left to do
    assert {name: (run / name / "stage.json").stat().st_mtime_ns for name in STAGES} == receipts
    edited = run / "configs" / "3_extend.yaml"
    edited.write_text(edited.read_text().replace("lr: 2.0e-03", "lr: 1.0e-03"))
    assert cli.main([*asked, *SHORT]) == 0
    again = {name: (run / name / "stage.json").stat().st_mtime_ns for name in STAGES}
    assert [name for name in STAGES if again[name] != receipts[name]] == ["3_extend"]
    assert "lr: 0.001" in (run / "3_extend/config.yaml").read_text()


def test_stage_files_follow_the_options_until_a_person_edits_them(tmp_path: Path) -> None:
    write_stages(wish(out=tmp_path))
    align, probe = (tmp_path / "configs" / f"{name}.yaml" for name in STAGES[:2])
    first = align.read_text()
    write_stages(wish(out=tmp_path, epochs=4.0))
    assert (first.count("250"), align.read_text().count("500")) == (1, 1)
    probe.write_text(probe.read_text() + "# mine\n")
    write_stages(wish(out=tmp_path, epochs=4.0))
    assert probe.read_text().endswith("# mine\n")
    with pytest.raises(UserError, match=r"2_probe.yaml was written for, got others, and it was edited"):
        write_stages(wish(out=tmp_path, epochs=1.0))
    assert "max_steps: 500" in align.read_text()


def test_data_that_were_added_to_are_other_data(pictures: Path) -> None:
    before = state_of(pictures)
    assert state_of(pictures) == before
    (pictures / "red" / "more.png").write_bytes(picture(0))
    assert state_of(pictures) != before


def test_a_file_of_other_pictures_is_measured_on(
    asked: list[str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"{colour_of(number)}/{number}.png,what?,{colour_of(number)}" for number in range(3)]
    (tmp_path / "held.csv").write_text("\n".join(["image,question,answer", *rows, ",how?,well"]))
    options = options_parser().parse_args([*asked[1:], "--val", str(tmp_path / "held.csv"), "--images", str(pictures)])
    train, val = make_shards(options)
    assert (count_samples(train), count_samples(val)) == (SAMPLES, 4)
    run = tmp_path / "run"
    purposes = dict(next_steps(run))
    assert purposes["ask it about a picture"].endswith(f"--image {run}/data/own/images/000000.png --prompt 'what?'")
    monkeypatch.setattr("moextend_pl.extend.own_data.run", lambda *_: pytest.fail("made again"))
    assert make_shards(options) == (train, val)
    shards = options_parser().parse_args([*asked[1:], "--data", str(train), "--out", str(tmp_path / "other")])
    monkeypatch.setattr("moextend_pl.extend.own_data.run", lambda words: said.append(words[:3]))
    said: list[list[str]] = []
    assert make_shards(shards) == (train, train)
    assert said == [["shards", "questions", str(train)]]


def test_shards_that_were_made_anew_are_asked_other_questions(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _ = make_shards(options_parser().parse_args(asked[1:]))
    options = options_parser().parse_args([*asked[1:], "--data", str(train), "--out", str(tmp_path / "other")])
    make_shards(options)
    said: list[list[str]] = []
    monkeypatch.setattr("moextend_pl.extend.own_data.run", lambda words: said.append(words[:3]))
    make_shards(options)
    assert said == []
    index = train / "index.json"
    index.write_text(index.read_text() + "\n")
    make_shards(options)
    assert said == [["shards", "questions", str(train)]]


def test_steps_are_those_of_the_file_or_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "stage.yaml").write_text("trainer: {max_steps: 70}")
    assert steps_of(tmp_path / "stage.yaml", ["--trainer.x=1"]) == 70
    assert steps_of(tmp_path / "stage.yaml", ["--trainer.max_steps=5"]) == 5
    (tmp_path / "stage.yaml").write_text("base: model.yaml")
    assert steps_of(tmp_path / "stage.yaml", []) == 0


@pytest.mark.slow
def test_a_dry_run_writes_and_plans_and_trains_nothing(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published(tmp_path / "some.tower")
    asked[asked.index("--tower") + 1] = str(tmp_path / "some.tower")
    assert cli.main([*asked, "--dry-run", "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert [out.count(f"\n{name}: ") for name in STAGES] == [1, 1, 1]
    assert out.count("hours") + out.count("minutes") > 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["configs", "data", "tower"]
    model = yaml.safe_load((tmp_path / "run/configs/model.yaml").read_text())["model"]["init_args"]
    assert Path(model["encoder"]["path"]).parent == tmp_path / "run/tower"


@pytest.mark.slow
def test_models_of_a_hub_are_fetched_once_and_pinned(
    asked: list[str], tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    asked[asked.index("--base") + 1], asked[asked.index("--tower") + 1] = "org/moe", "org/tower"
    with loopback_hub(tmp_path / "hub") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UserError, match="Expected 'org/moe' in the cache of the hub or in the hub itself"):
            cli.run([*asked, "--dry-run"])
        shutil.copytree(tiny_world.base, tmp_path / "hub/org/moe")
        shutil.copytree(tiny_world.encoder, tmp_path / "hub/org/tower")
        assert cli.run([*asked, *SHORT]) == 0
    arguments = yaml.safe_load((tmp_path / "run/configs/model.yaml").read_text())["model"]["init_args"]
    for place, name in ((arguments["language"]["base"], "org/moe"), (arguments["encoder"]["path"], "org/tower")):
        assert name_of(Path(place)) == (name, COMMIT)
    bases = json.loads((tmp_path / "run/3_extend/manifest.json").read_text())["bases"]
    assert bases["language"] == {"name": "org/moe", "revision": COMMIT}
    assert cli.run([*asked, "--dry-run"]) == 0  # the hub is gone, its cache is there


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--base", "nowhere"], "Expected a model's folder or org/name of a hub for `--base`, got 'nowhere'"),
        (["--tower", "."], "for `--tower`, got '.'"),
        (["--batch-size", "0"], "above 0, got 0 and 1"),
        (["--epochs", "inf"], "above 0, got 4 and inf"),
        (["--val", "nowhere"], r"Expected a .json, .* at nowhere, found nothing"),
        (["--trainer.max_steps", "3"], "does not accept '--trainer.max_steps'"),
        (["--data", "nowhere"], r"Expected a .json, .* at nowhere, found nothing"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_trained(
    asked: list[str], tmp_path: Path, change: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        cli.run([*asked, *change])
    assert not (tmp_path / "run" / "configs").exists()
