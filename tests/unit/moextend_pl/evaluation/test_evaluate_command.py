"""`evaluate` and `rescore` from the command line, on a tiny model and tiny sets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.cli_runs import error_of
from helpers.ranks import run_rounds
from helpers.test_sets import write_all
from helpers.tiny_world import TinyWorld, make_plan

from moextend_pl import cli
from moextend_pl.contracts import TrainPlan, UserError
from moextend_pl.evaluation.answering import ask, picture_of, read_predictions
from moextend_pl.evaluation.question import Question
from moextend_pl.evaluation.tasks import TASKS, folder_of
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def run(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    model = tiny_world.unbuilt()
    model.extension_plan, model.train_plan = make_plan(), TrainPlan(("projector", "new_experts"))
    model.configure_model()
    save_delta(model, tmp_path / "run")
    return tmp_path / "run"


def kept(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_answers_are_kept_scored_and_scored_again(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run), "--tasks", "own,vqav2", "--data", str(data), "--limit", "3",
                     "--draws", "20"]) == 0  # fmt: skip
    first = capsys.readouterr().out
    assert [line.split()[0] for line in first.splitlines()] == ["task", "own", "vqav2"]
    folder = run / "evaluation" / "vqav2"
    rows = kept(folder)
    model = MoExtend.load(run)
    questions = list(TASKS["vqav2"].questions(folder_of(data, "vqav2")))[:3]
    assert [row["prediction"] for row in rows] == [model.generate(picture_of(q), q.prompt) for q in questions]
    scores = json.loads((folder / "scores_official.json").read_text())
    assert scores["questions"] == 3
    assert set(scores["scores"]["accuracy"]) == {"value", "low", "high"}
    # Offline: neither the data nor the model is there any more.
    (run / "manifest.json").unlink()
    assert cli.main(["rescore", str(run), "--draws", "20"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(first.splitlines())
    assert cli.main(["rescore", str(run), "--tasks", "vqav2:lmms_eval", "--against", str(run), "--draws", "20"]) == 0
    assert "p = 1.000" in capsys.readouterr().out
    assert (folder / "scores_lmms_eval.json").is_file()


def test_only_what_is_left_is_asked(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(run), "--tasks", "own", "--data", str(data), "--draws", "5"]
    assert cli.main(command) == 0
    path = run / "evaluation" / "own" / "predictions.jsonl"
    whole = path.read_text()
    path.write_text(whole[: len(whole) - 9])  # killed while it wrote
    asked = []
    ours = MoExtend.generate
    monkeypatch.setattr(MoExtend, "generate", lambda *a, **k: asked.append(a) or ours(*a, **k))
    assert cli.main(command) == 0
    assert path.read_text() == whole
    assert len(asked) == 1
    capsys.readouterr()
    assert "or by another --task or --reduce" in error_of(capsys, [*command, "--reduce", "aim_merge"])
    (run / "manifest.json").write_text((run / "manifest.json").read_text() + "\n")
    assert "answers of another model" in error_of(capsys, command)


def asking(folder: Path, question: Question) -> list[dict[str, str]]:
    return ask([question], folder, {}, lambda questions: ["blue" for _ in questions], 1)


@pytest.mark.parametrize("changed", ["prompt", "truth", "picture"])
def test_an_answer_is_kept_for_its_own_question_only(tmp_path: Path, changed: str) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    question = Question("1", "what?", ["blue"], str(tmp_path / "a.png"))
    first = asking(tmp_path / "own", question)
    assert asking(tmp_path / "own", question) == first
    others = {"prompt": "why?", "truth": ["red"]}
    if changed == "picture":
        (tmp_path / "a.png").write_bytes(b"b")
    else:
        question = replace(question, **{changed: others[changed]})
    with pytest.raises(UserError, match="keeps answers to other prompts, pictures or truths, for example of 1"):
        asking(tmp_path / "own", question)


def test_reading_what_another_run_writes_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text('{"key": "1"}\n{"key":')
    assert read_predictions(tmp_path) == [{"key": "1"}]
    assert (tmp_path / "predictions.jsonl").read_text() == '{"key": "1"}\n{"key":'


@pytest.mark.parametrize("answer", ["blue", ["red", "blue"], 3])
def test_questions_of_ones_own_have_one_answer_or_several(tmp_path: Path, answer: object) -> None:
    (tmp_path / "own").mkdir()
    row = {"question_id": 1, "text": "what?", "answer": answer}
    (tmp_path / "own" / "questions.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = TASKS["own"].questions(tmp_path / "own")
    said = "3" if answer == 3 else "blue"
    for protocol in TASKS["own"].protocols:
        metric = TASKS["own"].metric(protocol)
        metric.update(["1"], [said], [question.truth])
        assert {float(value) for value in metric.compute().values()} == {1.0}, protocol


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"question_id": 2, "text": "what?", "answer": null}', "expected an `answer` in entry 2, got None"),
        (b'{"question_id": 2, "text": "what?", "answer": []}', r"expected an `answer` in entry 2, got \[\]"),
        (b'{"question_id": 2, "text": "caf\xe9", "answer": "a"}', "questions.jsonl:2: expected a JSON object"),
        (b"7", "questions.jsonl:2: expected a JSON object on each line, got '7'"),
    ],
)
def test_questions_that_nobody_could_answer_rightly_are_refused(tmp_path: Path, line: bytes, sentence: str) -> None:
    first = b'{"question_id": 1, "text": "what?", "answer": "blue"}\n'
    (tmp_path / "questions.jsonl").write_bytes(first + line + b"\n")
    with pytest.raises(UserError, match=sentence):
        list(TASKS["own"].questions(tmp_path))


def test_mistakes_come_before_the_model(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = ["evaluate", "nowhere", "--data", str(data)]
    assert "tasks out of" in error_of(capsys, [*nowhere, "--tasks", "vqa"])
    assert "at least 1" in error_of(capsys, [*nowhere, "--tasks", "own", "--batch-size", "0"])
    assert "found none. Run `evaluate` first" in error_of(capsys, ["rescore", str(run)])
    assert "found no file" in error_of(capsys, ["rescore", str(run), "--tasks", "pope"])
    assert "nowhere" in error_of(capsys, [*nowhere, "--tasks", "own"])
    assert "at least 1" in error_of(capsys, [*nowhere, "--tasks", "own", "--limit", "0"])
    assert "got vqav2 twice" in error_of(capsys, [*nowhere, "--tasks", "vqav2,vqav2:lmms_eval"])
    for device in ("gpu", "cuda:77"):
        assert f"got '{device}'" in error_of(capsys, [*nowhere, "--tasks", "own", "--device", device])


@pytest.mark.slow
def test_two_processes_keep_the_answers_of_one(run: Path, data: Path, tmp_path: Path) -> None:
    command = ["evaluate", str(run), "--tasks", "pope,own", "--data", str(data), "--draws", "20", "--batch-size", "2"]
    places = [tmp_path / name for name in ("one", "two")]
    first, second = ([*command, "--out", str(place)] for place in places)
    run_rounds([(1, [first]), (2, [second])], tmp_path)
    for task, file in (("pope", "predictions.jsonl"), ("own", "predictions.jsonl"), ("pope", "scores_llava.json")):
        one, two = ((place / task / file).read_text() for place in places)
        assert two == one
    keys = [row["key"] for row in kept(places[1] / "pope")]
    assert len(set(keys)) == len(keys) > 2
    assert "pope" in (tmp_path / "rank0_of_round1.log").read_text()
    assert "pope" not in (tmp_path / "rank1_of_round1.log").read_text()  # one table is enough


def test_processes_that_do_not_know_each_other_are_refused(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert "srun torchrun" in error_of(capsys, ["evaluate", str(run), "--tasks", "own", "--data", str(data)])
