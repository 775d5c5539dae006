"""Test sets with answers as text, read from their published files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from moextend_pl.contracts import UserError
from moextend_pl.evaluation.metrics.yes_no import COGNITION, PERCEPTION
from moextend_pl.evaluation.question import SHORT, Question, find, read, read_lines

CAPTION = "Provide a one-sentence caption for the provided image."
POPE_CATEGORIES = ("random", "popular", "adversarial")
MME_FORMATS = (".jpg", ".png", ".jpeg")


def vqav2(folder: Path) -> Iterator[Question]:
    """Yields VQAv2's validation split: `v2_OpenEnded_mscoco_val2014_questions.json`, its annotations, `val2014/`."""
    says = "the {} of VQAv2's validation split"
    questions = read(find(folder, "v2_OpenEnded_mscoco_val2014_questions.json", says=says.format("questions")))
    told = read(find(folder, "v2_mscoco_val2014_annotations.json", says=says.format("annotations")))
    pictures = find(folder, "val2014", says="the pictures of COCO's val2014")
    people = {each["question_id"]: each for each in told["annotations"]}
    for each in questions["questions"]:
        answers = people[each["question_id"]]
        yield Question(
            key=str(each["question_id"]),
            prompt=each["question"] + SHORT,
            truth={"answers": [a["answer"] for a in answers["answers"]], "answer_type": answers["answer_type"]},
            picture=str(pictures / f"COCO_val2014_{each['image_id']:012d}.jpg"),
        )


def textvqa(folder: Path, tokens: bool = False) -> Iterator[Question]:
    """Yields TextVQA's validation split: `TextVQA_0.5.1_val.json` and `train_images/`.

    Args:
        folder: Of the set.
        tokens: Whether the prompt holds the text that `TextVQA_Rosetta_OCR_v0.2_val.json` read in the picture, as
            LLaVA's does; worth about 12 points.
    """
    entries = read(find(folder, "TextVQA_0.5.1_val.json", says="TextVQA's validation split"))
    pictures = find(folder, "train_images", "train_val_images/train_images", says="TextVQA's pictures")
    seen: dict[str, list[str]] = {}
    if tokens:
        ocr = read(find(folder, "TextVQA_Rosetta_OCR_v0.2_val.json", says="the text read in TextVQA's pictures"))
        seen = {each["image_id"]: each["ocr_tokens"] for each in ocr["data"]}
    for each in entries["data"]:
        hint = f"\nReference OCR token: {', '.join(seen.get(each['image_id'], []))}" if tokens else ""
        yield Question(
            key=str(each["question_id"]),
            prompt=each["question"] + hint + SHORT,
            truth=each["answers"],
            picture=str(pictures / f"{each['image_id']}.jpg"),
        )


def textvqa_ocr(folder: Path) -> Iterator[Question]:
    """Yields TextVQA's validation split with the text in the picture given in the prompt."""
    return textvqa(folder, tokens=True)


def gqa(folder: Path) -> Iterator[Question]:
    """Yields GQA's balanced test-dev split: `testdev_balanced_questions.json` and `images/`."""
    name = "testdev_balanced_questions.json"
    places = (name, f"questions1.2/{name}", f"data/{name}", f"data/questions1.2/{name}")
    entries = read(find(folder, *places, says="GQA's balanced test-dev split"))
    pictures = find(folder, "images", "data/images", says="GQA's pictures")
    for key, each in entries.items():
        yield Question(
            key=key,
            prompt=each["question"] + SHORT,
            truth={"answer": each["answer"], "type": each.get("types", {}).get("structural", "")},
            picture=str(pictures / f"{each['imageId']}.jpg"),
        )


def pope(folder: Path) -> Iterator[Question]:
    """Yields POPE on COCO: `coco_pope_{random,popular,adversarial}.json` and `val2014/`."""
    pictures = find(folder, "val2014", "coco/val2014", says="the pictures of COCO's val2014")
    for category in POPE_CATEGORIES:
        name = f"coco_pope_{category}.json"
        for each in read_lines(find(folder, name, f"coco/{name}", says=f"POPE's {category} questions")):
            yield Question(
                key=f"{category}/{each['question_id']}",
                prompt=each["text"] + SHORT,
                truth={"label": each["label"], "category": category},
                picture=str(pictures / each["image"]),
            )


def mme(folder: Path) -> Iterator[Question]:
    """Yields MME: a folder a subtask, `NAME.txt` with two lines `question TAB Yes or No` beside `NAME.jpg` or `.png`.

    Raises:
        UserError: If a line is none of these, or a picture is missing.
    """
    root = find(folder, "MME_Benchmark_release_version", ".", says="MME's release")
    root = root / "MME_Benchmark" if (root / "MME_Benchmark").is_dir() else root
    subtasks = [name for name in (*PERCEPTION, *COGNITION) if (root / name).is_dir()]
    if not subtasks:
        raise UserError(f"Expected folders of MME's subtasks, for example {PERCEPTION[0]}, in {root}, found none.")
    for subtask in subtasks:
        place = root / subtask
        texts = place / "questions_answers_YN" if (place / "questions_answers_YN").is_dir() else place
        pictures = place / "images" if (place / "images").is_dir() else place
        for text in sorted(texts.glob("*.txt")):
            picture = next((p for s in MME_FORMATS if (p := pictures / f"{text.stem}{s}").is_file()), None)
            if picture is None:
                raise UserError(f"Expected a picture {text.stem}.jpg or .png in {pictures}, found none.")
            for number, line in enumerate(text.read_text(encoding="utf-8").strip().splitlines()):
                question, tab, label = line.strip().rpartition("\t")
                if not tab or label.strip().lower() not in ("yes", "no"):
                    raise UserError(
                        f"{text}:{number + 1}: expected a question, a tab and Yes or No, got {line[:60]!r}."
                    )
                yield Question(
                    key=f"{subtask}/{text.stem}/{number}",
                    prompt=question.replace("Please answer yes or no.", "").strip() + SHORT,
                    truth={"label": label.strip().lower(), "subtask": subtask, "image": text.stem},
                    picture=str(picture),
                    group=f"{subtask}/{text.stem}",
                )


def docvqa(folder: Path) -> Iterator[Question]:
    """Yields DocVQA's validation split: `val_v1.0_withQT.json` or `val_v1.0.json`, and `documents/`."""
    path = find(folder, "val_v1.0_withQT.json", "val_v1.0.json", "val/val_v1.0.json", says="DocVQA's validation split")
    for each in read(path)["data"]:
        yield Question(
            key=str(each["questionId"]),
            prompt=each["question"] + SHORT,
            truth=each["answers"],
            picture=str(path.parent / each["image"]),
        )


def infovqa(folder: Path) -> Iterator[Question]:
    """Yields InfographicVQA's validation split: `infographicsVQA_val_v1.0_withQT.json` and its pictures' folder."""
    path = find(folder, "infographicsVQA_val_v1.0_withQT.json", says="InfographicVQA's validation split")
    pictures = find(folder, "infographicsvqa_images", "images", says="InfographicVQA's pictures")
    for each in read(path)["data"]:
        yield Question(
            key=str(each["questionId"]),
            prompt=each["question"] + SHORT,
            truth=each["answers"],
            picture=str(pictures / each["image_local_name"]),
        )


def captions(folder: Path) -> Iterator[Question]:
    """Yields pictures with captions of Karpathy's test split (`dataset_coco.json`, `dataset_flickr30k.json`), or of a
    file in COCO's form (`captions_val2014.json`, `nocaps_val_4500_captions.json`).

    Pictures lie in a folder that the file names, beside it or in `images/`.
    """  # noqa: D205
    karpathy = ("dataset_coco.json", "dataset_flickr30k.json")
    path = find(folder, *karpathy, "captions_val2014.json", "nocaps_val_4500_captions.json", says="captions")
    content = read(path)
    told: dict[str, list[str]] = defaultdict(list)
    places: dict[str, str] = {}
    if path.name in karpathy:
        for each in (image for image in content["images"] if image["split"] == "test"):
            key = str(each.get("cocoid", each["imgid"]))
            told[key] = [sentence["raw"] for sentence in each["sentences"]]
            places[key] = str(Path(each.get("filepath", "")) / each["filename"])
    else:
        for each in content["annotations"]:
            told[str(each["image_id"])].append(each["caption"])
        places = {str(each["id"]): each["file_name"] for each in content["images"]}
    for key, texts in told.items():
        place = next((p for f in ("", "images", "val2014") if (p := folder / f / places[key]).is_file()), None)
        yield Question(key=key, prompt=CAPTION, truth=texts, picture=str(place or folder / places[key]))


def own(folder: Path) -> Iterator[Question]:
    """Yields questions of one's own: `questions.jsonl` with `question_id`, `text`, `answer` and, where there is a
    picture, `image`; pictures in `images/`, or beside the file.

    Raises:
        UserError: If a line lacks one, or has no answer.
    """  # noqa: D205
    path = find(folder, "questions.jsonl", says="questions, one JSON object a line")
    pictures = folder / "images" if (folder / "images").is_dir() else folder
    for number, each in enumerate(read_lines(path), start=1):
        missing = [name for name in ("question_id", "text", "answer") if name not in each]
        if missing:
            raise UserError(
                f"{path}: expected `question_id`, `text` and `answer` in entry {number}, got no {missing[0]}."
            )
        picture = str(pictures / each["image"]) if each.get("image") else ""
        answers = each["answer"] if isinstance(each["answer"], list) else [each["answer"]]
        if not answers or None in answers:
            raise UserError(f"{path}: expected an `answer` in entry {number}, got {each['answer']!r}. Write it there.")
        yield Question(str(each["question_id"]), each["text"], [str(answer) for answer in answers], picture)
