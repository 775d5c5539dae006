"""Published test sets of a few questions each, in the layout of their files."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

from helpers.tiny_world import QUESTION, picture


def put(path: Path, content: Any) -> Path:
    """Writes JSON, text or bytes, and the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines(entries: list[dict[str, Any]]) -> str:
    """Returns JSON Lines."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def write_pope(data: Path, count: int = 4) -> None:
    """Writes POPE."""
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": f"p{n}.jpg", "text": QUESTION, "label": ["yes", "no"][n % 2]}
            for n in range(count)
        ]
        put(data / "pope" / "coco" / f"coco_pope_{category}.json", lines(rows))
    for n in range(count):
        put(data / "pope" / "val2014" / f"p{n}.jpg", picture(n))


def write_vqav2(data: Path, count: int = 5) -> None:
    """Writes VQAv2's validation split."""
    ids = [{"question_id": 10 + n, "image_id": n, "question": QUESTION} for n in range(count)]
    told = [
        {
            **{key: each[key] for key in ("question_id", "image_id")},
            "answer_type": ["other", "yes/no"][n % 2],
            "answers": [{"answer": "Red" if i < n else "blue", "answer_id": i} for i in range(10)],
        }
        for n, each in enumerate(ids)
    ]
    put(data / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": ids})
    put(data / "vqav2" / "v2_mscoco_val2014_annotations.json", {"annotations": told})
    for n in range(count):
        put(data / "vqav2" / "val2014" / f"COCO_val2014_{n:012d}.jpg", picture(n))


def write_mme(data: Path) -> None:
    """Writes two subtasks of MME, one in each of its two layouts."""
    text = f"{QUESTION} Please answer yes or no.\tYes\n{QUESTION}\tNo\n"
    root = data / "MME" / "MME_Benchmark_release_version"
    for n in range(2):
        put(root / "color" / f"{n}.txt", text)
        put(root / "color" / f"{n}.png", picture(n))
        put(root / "posters" / "questions_answers_YN" / f"t{n}.txt", text)
        put(root / "posters" / "images" / f"t{n}.jpg", picture(n))


def write_scienceqa(data: Path) -> None:
    """Writes ScienceQA's test split: one question with a picture, one without."""
    problem = {"question": QUESTION, "choices": ["red", "blue", "black"], "answer": 1, "hint": "", "image": "image.png"}
    problems = {"7": problem, "9": {**problem, "hint": "a picture", "image": None, "choices": ["no", "yes"]}, "11": {}}
    put(data / "scienceqa" / "problems.json", problems)
    put(data / "scienceqa" / "pid_splits.json", {"train": ["11"], "test": ["7", "9"]})
    put(data / "scienceqa" / "images" / "test" / "7" / "image.png", picture(1))


def write_mmbench(data: Path, rotations: bool = False) -> None:
    """Writes MMBench's development split, of questions alone or with their rotations."""
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]
    image = base64.b64encode(picture(1)).decode()
    rows: list[list[Any]] = [
        [3, "first ?", "a hint", "red", "blue", "nan", "", "B", "colour", image, "attribute"],
        [4, "second\nline ?", "", "red", "blue", "black", "green", "C", "colour", image, "attribute"],
    ]
    if rotations:
        rows.append([1_000_003, "first ?", "a hint", "blue", "red", "", "", "A", "colour", "3", "attribute"])
        rows = [row for row in rows if row[0] != 4]
    path = put(data / "mmbench" / "mmbench_dev_20230712.tsv", "")
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])


def write_others(data: Path) -> None:
    """Writes TextVQA, GQA, DocVQA, InfographicVQA, captions and questions of one's own."""
    put(data / "textvqa" / "TextVQA_0.5.1_val.json", {"data": [
        {"question_id": 1, "image_id": "a", "question": QUESTION, "answers": ["red"] * 10}]})  # fmt: skip
    put(data / "textvqa" / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "a", "ocr_tokens": ["X", "Y"]}]})
    put(data / "textvqa" / "train_images" / "a.jpg", picture(0))
    put(data / "gqa" / "questions1.2" / "testdev_balanced_questions.json", {
        "g1": {"imageId": "n1", "question": QUESTION, "answer": "red", "types": {"structural": "query"}}})  # fmt: skip
    put(data / "gqa" / "images" / "n1.jpg", picture(0))
    put(data / "docvqa" / "val_v1.0_withQT.json", {"data": [
        {"questionId": 5, "question": QUESTION, "image": "documents/d.png", "answers": ["red", "blue"]}]})  # fmt: skip
    put(data / "docvqa" / "documents" / "d.png", picture(0))
    put(data / "infovqa" / "infographicsVQA_val_v1.0_withQT.json", {"data": [
        {"questionId": 6, "question": QUESTION, "image_local_name": "i.jpeg", "answers": ["red"]}]})  # fmt: skip
    put(data / "infovqa" / "images" / "i.jpeg", picture(0))
    put(data / "captions" / "dataset_coco.json", {"images": [
        {"split": "test", "imgid": 0, "cocoid": 42, "filepath": "val2014", "filename": "c.jpg",
         "sentences": [{"raw": "a red picture"}, {"raw": "red"}]},
        {"split": "train", "imgid": 1, "cocoid": 43, "filepath": "val2014", "filename": "x.jpg", "sentences": []},
        {"split": "test", "imgid": 2, "cocoid": 44, "filepath": "val2014", "filename": "c.jpg",
         "sentences": [{"raw": "a blue picture"}]}]})  # fmt: skip
    put(data / "captions" / "val2014" / "c.jpg", picture(0))
    put(data / "own" / "questions.jsonl", lines([
        {"question_id": "a", "text": QUESTION, "answer": "red", "image": "o.png"},
        {"question_id": "b", "text": QUESTION, "answer": ["no", "yes"]}]))  # fmt: skip
    put(data / "own" / "images" / "o.png", picture(0))


def write_all(data: Path) -> Path:
    """Writes all of them and returns their folder."""
    for write in (write_pope, write_vqav2, write_mme, write_scienceqa, write_mmbench, write_others):
        write(data)
    return data
