"""Test sets are read from their published files, and every mistake is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.test_sets import put, write_all, write_mmbench, write_mme, write_pope
from helpers.tiny_world import QUESTION, picture

from moextend_pl.contracts import UserError
from moextend_pl.evaluation.answering import check_pictures, picture_of
from moextend_pl.evaluation.question import LETTER, SHORT, Question
from moextend_pl.evaluation.tasks import TASKS, folder_of, parse_tasks, whole_groups


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("sets"))


def questions(data: Path, task: str, limit: int | None = None) -> list[Question]:
    return whole_groups(TASKS[task].questions(folder_of(data, task)), limit)


@pytest.mark.parametrize(
    ("task", "count", "key", "prompt"),
    [
        ("pope", 12, "random/0", QUESTION + SHORT),
        ("vqav2", 5, "10", QUESTION + SHORT),
        ("textvqa", 1, "1", QUESTION + SHORT),
        ("textvqa_ocr", 1, "1", f"{QUESTION}\nReference OCR token: X, Y{SHORT}"),
        ("gqa", 1, "g1", QUESTION + SHORT),
        ("mme", 8, "color/0/0", QUESTION + SHORT),
        ("scienceqa", 2, "7", f"{QUESTION}\nA. red\nB. blue\nC. black{LETTER}"),
        ("mmbench", 6, "3/0", f"a hint\nfirst ?\nA. red\nB. blue{LETTER}"),
        ("captions", 2, "42", "Provide a one-sentence caption for the provided image."),
        ("docvqa", 1, "5", QUESTION + SHORT),
        ("infovqa", 1, "6", QUESTION + SHORT),
        ("own", 2, "a", QUESTION),
    ],
)
def test_set_is_read_and_a_perfect_answer_scores_full(data: Path, task: str, count: int, key: str, prompt: str) -> None:
    found = questions(data, task)
    assert (len(found), found[0].key, found[0].prompt) == (count, key, prompt)
    check_pictures(found, task)
    image = picture_of(found[0])
    assert image is not None
    assert image.size == (32, 32)
    metric = TASKS[task].metric("")
    perfect = [{"key": q.key, "prediction": right(task, q), "truth": q.truth} for q in found]
    scores = metric.score(perfect)  # type: ignore[arg-type]
    full = {"mme": 400.0, "captions": scores[TASKS[task].headline]}.get(task, 1.0)
    assert scores[TASKS[task].headline] == pytest.approx(full)


def right(task: str, question: Question) -> str:
    truth = question.truth
    if task == "vqav2":
        return max(truth["answers"], key=truth["answers"].count)
    if isinstance(truth, dict):
        return str(truth.get("label") or truth["answer"])
    return truth if isinstance(truth, str) else str(truth[0])


def test_every_task_is_read_by_a_test_and_documented(data: Path) -> None:
    page = (Path(__file__).parents[4] / "docs" / "evaluation.md").read_text()
    for name, task in TASKS.items():
        assert folder_of(data, name).is_dir()
        assert f"`{name}`" in page
        for protocol in task.protocols:
            assert task.metric(protocol) is not None


def test_rotations_are_made_where_the_file_has_none(data: Path) -> None:
    second = [q for q in questions(data, "mmbench") if q.group == "4"]
    assert [q.truth["options"]["A"] for q in second] == ["red", "blue", "black", "green"]
    assert [q.truth["options"][q.truth["answer"]] for q in second] == ["black"] * 4
    assert {q.prompt.count("\n") for q in second} == {6}


def test_rotations_of_the_file_are_taken_with_the_picture_they_point_to(tmp_path: Path) -> None:
    write_mmbench(tmp_path, rotations=True)
    found = questions(tmp_path, "mmbench")
    assert [(q.key, q.group, q.truth["answer"]) for q in found] == [("3/0", "3", "B"), ("1000003/0", "3", "A")]
    assert found[0].picture == found[1].picture
    assert found[0].picture.startswith("data:")


def test_a_limit_keeps_groups_whole(data: Path) -> None:
    assert [q.key for q in questions(data, "mmbench", 1)] == ["3/0", "3/1"]
    assert len(questions(data, "mme", 3)) == 4
    assert len(questions(data, "pope", 3)) == 3


def test_scienceqa_without_a_picture_is_asked_as_text(data: Path) -> None:
    _, text = questions(data, "scienceqa")
    assert picture_of(text) is None
    assert text.prompt.startswith("Context: a picture\n")
    assert text.truth == {"answer": "B", "choices": 2, "image": False}


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tasks out of vqav2, .*got 'popes'"):
        parse_tasks("pope,popes")
    with pytest.raises(UserError, match=r"protocol of pope out of llava, lmms_eval, got 'strict'"):
        parse_tasks("pope:strict")
    assert parse_tasks("pope, vqav2:lmms_eval") == {"pope": "", "vqav2": "lmms_eval"}
    with pytest.raises(UserError, match="found no such folder"):
        folder_of(tmp_path, "pope")
    with pytest.raises(UserError, match="found no such folder"):
        folder_of(tmp_path / "nowhere", "pope")
    write_pope(tmp_path)
    (tmp_path / "pope" / "val2014" / "p1.jpg").unlink()
    with pytest.raises(UserError, match=r"found no file for 1 of 4, for example .*p1\.jpg"):
        check_pictures(questions(tmp_path, "pope"), "pope")
    (tmp_path / "pope" / "coco" / "coco_pope_popular.json").unlink()
    with pytest.raises(UserError, match="POPE's popular questions"):
        questions(tmp_path, "pope")
    put(tmp_path / "pope" / "coco" / "coco_pope_popular.json", "{}\nno\n")
    with pytest.raises(UserError, match=r"coco_pope_popular\.json:2: expected a JSON object"):
        list(json_lines(tmp_path))


def json_lines(folder: Path) -> list[dict[str, object]]:
    from moextend_pl.evaluation.question import read_lines

    return list(read_lines(folder / "pope" / "coco" / "coco_pope_popular.json"))


def test_broken_sets_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "own" / "questions.jsonl", json.dumps({"question_id": 1, "text": "x"}) + "\n")
    with pytest.raises(UserError, match="got no answer"):
        questions(tmp_path, "own")
    put(tmp_path / "own" / "questions.jsonl", (json.dumps({"question_id": 1, "text": "x", "answer": "y"}) + "\n") * 2)
    with pytest.raises(UserError, match="got 1 twice"):
        questions(tmp_path, "own")
    write_mme(tmp_path)
    put(tmp_path / "MME" / "MME_Benchmark_release_version" / "color" / "0.txt", "is it ?\tMaybe")
    with pytest.raises(UserError, match=r"0\.txt:1: expected a question, a tab and Yes or No"):
        questions(tmp_path, "mme")
    put(tmp_path / "gqa" / "testdev_balanced_questions.json", "{")
    with pytest.raises(UserError, match="expected JSON"):
        questions(tmp_path, "gqa")
    bad = Question("k", "p", "t", "data:image/png;base64,###")
    with pytest.raises(UserError, match="k: expected a picture in base64"):
        picture_of(bad)
    assert picture(1) != picture(2)
