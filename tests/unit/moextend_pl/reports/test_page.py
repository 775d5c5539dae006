"""The page of a run, from files written by hand."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from moextend_pl import cli
from moextend_pl.reports.page import flat, page, tiles
from moextend_pl.reports.page_plots import curves_svg, usage_svg
from moextend_pl.reports.run_facts import find_runs, read_curves, read_run

HOSTILE = "<script>alert('x')</script>"
VOID = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Checks that tags close, and keeps texts, tags and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "3_extend"
    (folder / "plots").mkdir(parents=True)
    (folder / "evaluation" / "pope").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model:\n  class_path: moextend_pl.MoExtend\n  note: {json.dumps(HOSTILE)}\n")
    # Steps 1 and 2 were taken twice; a kill cut the last row off.
    rows = ["step,train/loss,val/loss", "0,4.0,", "1,3.0,", "2,9.0,", "1,3.0,", "2,2.0,", "2,,2.5"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "stage.json").write_text(json.dumps({"steps": 3, "seconds": 7201.0, "outputs": {}}))
    (folder / "frozen.json").write_text(json.dumps({"unchanged": True, "tensors": 1234}))
    plan = {"layers": [{"layer": 1, "sources": [0, 2]}], "report": {"scores": {0: 0.1, 1: 0.7}}}
    (folder / "extension_plan.yaml").write_text(json.dumps(plan))
    usage = [
        {
            "step": step,
            "new": {"1": 1},
            "language": {k: {"0": [4, 4], "1": [1, step, 2]} for k in ("image", "text", "all")},
        }
        for step in (2, 2, 4)
    ]
    (folder / "expert_usage.jsonl").write_text("\n".join(map(json.dumps, usage)) + '\n{"step": 6, "langu')
    answers = [
        {"prompt": f"what? {n}", "prediction": HOSTILE, "answer": "red", "correct": n % 4 > 0} for n in range(40)
    ]
    (folder / "predictions_vqa.jsonl").write_text("\n".join(map(json.dumps, answers)))
    scores = {"scores": {"f1": {"value": 0.875, "low": 0.8, "high": 0.9}}}
    (folder / "evaluation" / "pope" / "scores_official.json").write_text(json.dumps(scores))
    Image.new("RGB", (8, 8), "red").save(folder / "plots" / "answers.png")
    return folder


def test_page_loads_nothing_and_runs_nothing(run: Path) -> None:
    text = page(f"my {HOSTILE}", [read_run(run)])
    read = Reader(text)
    assert "script" not in read.tags
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in read.addresses)
    assert not re.search(r"url\((?!#)|@import", text)
    sizes = [
        Image.open(io.BytesIO(base64.b64decode(a.partition(",")[2]))).size for a in read.addresses if a[:5] == "data:"
    ]
    assert (8, 8) in sizes
    assert HOSTILE in "".join(read.texts)


def test_first_facts_are_those_of_the_files(run: Path) -> None:
    assert tiles(read_run(run)) == {
        "steps": "3", "trained for": "2.0 h", "validation loss": "2.5",
        "1,234 frozen tensors": "unchanged, bit for bit",
        "new experts": "2", "right on vqa": "75.0% of 40",
    }  # fmt: skip
    (run / "stage.json").unlink()
    assert tiles(read_run(run))["state"] == "not ended; last logged step 3"


def test_last_row_of_a_step_counts(run: Path) -> None:
    assert read_curves(run / "metrics.csv") == {"train/loss": ([0, 1, 2], [4.0, 3.0, 2.0]), "val/loss": ([2], [2.5])}
    for cut in ("3,0.4e", "3", ""):  # by a kill
        (run / "metrics.csv").write_text(f"train/loss,step\n4.0,0\n{','.join(reversed(cut.split(',')))}")
        assert read_curves(run / "metrics.csv") == {"train/loss": ([0], [4.0])}


def test_answers_are_shown_in_the_proportion_of_all(run: Path) -> None:
    shown, right, count = read_run(run).answers["vqa"]
    assert (right, count, len(shown)) == (30, 40, 12)
    assert sum(row["correct"] for row in shown) == 9


def test_usage_of_a_step_taken_twice_stands_once_and_a_cut_line_not(run: Path) -> None:
    assert [row["step"] for row in read_run(run).usage] == [2, 4]
    drawn = usage_svg(read_run(run).usage)
    assert drawn.count("layer 1, image tokens") == 1
    assert usage_svg(read_run(run).usage[:1]) == ""


def test_forgetting_is_shown(run: Path) -> None:
    assert "still knows" not in page("x", [read_run(run)])
    found = {
        "base": {"perplexity": 7.25, "accuracy": None},
        "extended": {"perplexity": 7.5, "accuracy": None},
        "drift": {"identical": False, "largest": 0.25},
        "chose_new": 0.125,
    }
    (run / "evaluation" / "retention.json").write_text(json.dumps({"wiki": found}))
    (run / "metrics.csv").write_text("step,retention/wiki_perplexity\n2,7.3\n4,7.5\n")
    texts = [text for text in Reader(page("x", [read_run(run)])).texts if text.strip()]
    place = texts.index("wiki")
    assert texts[place : place + 4] == ["wiki", "perplexity", "7.2500", "7.5000"]
    assert {"up to 0.25 apart", "12.50%", "wiki perplexity"} <= set(texts)


def test_same_run_gives_the_same_page(run: Path) -> None:
    assert page("x", [read_run(run)]) == page("x", [read_run(run)])


def test_command_shows_a_run_or_a_folder_of_runs_and_refuses_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_runs(run) == find_runs(run.parent) == [run]
    assert cli.main(["report", str(run.parent)]) == 0
    assert "0.8000 to 0.9000" in (run.parent / "report.html").read_text()
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        assert cli.main(["report", str(tmp_path / folder)]) == 2
        assert "Expected a run directory" in capsys.readouterr().err
        assert not (tmp_path / folder / "report.html").exists()


def test_an_empty_and_a_damaged_run_have_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"")
    (tmp_path / "stage.json").write_bytes(b"{")
    (tmp_path / "config.yaml").write_bytes(b"a: [\xff")
    Reader(page("x", [read_run(tmp_path)]))
    assert curves_svg({}) == ""


def test_settings_are_rows_of_dotted_names() -> None:
    assert flat({"a": {"b": {"c": 1}}, "d": {}}) == [("a.b.c", "1"), ("d", "{}")]
