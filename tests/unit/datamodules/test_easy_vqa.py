from __future__ import annotations

import json
import shutil
import types
from collections import Counter
from pathlib import Path

import easy_vqa as package
import pytest
import webdataset
from PIL import Image
from transformers import AutoTokenizer

from datamodules.easy_vqa import COLOURS, SCENES, SHAPES, Scene, build_easy_vqa, derive_scene, pictures_of, read_split
from moextend_pl.contracts import UserError


def samples(out, name, split):
    urls = [str(path) for path in sorted((out / name / split).glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return {sample["__key__"]: sample for sample in data}


def turns(sample):
    values = [turn["value"] for turn in json.loads(sample["json"])["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


@pytest.mark.parametrize("split", ["train", "test"])
def test_vqa_is_the_package_word_for_word(built, split):
    found = samples(built[0], "vqa", split)
    if split == "train":
        kept = samples(built[0], "vqa", "val")
        assert found.keys().isdisjoint(kept)
        found |= kept
    paths = getattr(package, f"get_{split}_image_paths")()
    expected: dict[int, list[tuple[str, str]]] = {}
    for text, answer, number in zip(*getattr(package, f"get_{split}_questions")(), strict=True):
        expected.setdefault(number, []).append((text, answer))
    assert {int(key) for key in found} == set(paths)
    for number, pairs in expected.items():
        sample = found[f"{number:05d}"]
        first, *rest = turns(sample)
        assert [(first[0].removeprefix("<image>\n"), first[1]), *rest] == pairs
        assert first[0].startswith("<image>\n")
        assert sample["png"] == Path(paths[number]).read_bytes()


def test_the_official_test_split_has_its_size(built):
    shards = built[1]["vqa/test"]
    assert (sum(map(len, shards)), sum(int(shard.turns.sum()) for shard in shards)) == (1000, 9673)
    assert sum(map(len, built[1]["vqa/train"])) == 3800
    assert sum(map(len, built[1]["vqa/val"])) == 200


def paint(path) -> tuple[int, int, int]:
    """The most frequent colour of an image that is not its light background."""
    image = Image.open(path).convert("RGB")
    colours = Counter(image.get_flattened_data() if hasattr(image, "get_flattened_data") else image.getdata())
    return next(colour for colour, _ in colours.most_common() if min(colour) < 200)


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_name_the_colour_that_is_painted(built, split):
    """The answers gave the captions; the pixels have to agree with them."""
    paths = getattr(package, f"get_{split}_image_paths")()
    found = samples(built[0], "captions", split)
    by_colour: dict[str, set[str]] = {}
    means = {"red": 0, "green": 1, "blue": 2}
    for key, sample in list(found.items())[:400]:
        ((question, answer),) = turns(sample)
        assert question == "<image>\ndescribe the image."
        article, colour, shape = answer.split()
        assert article == "a"
        assert shape in SHAPES
        red, green, blue = paint(paths[int(key)])
        if colour in means:
            assert max(range(3), key=(red, green, blue).__getitem__) == means[colour], (key, colour)
        if colour in ("black", "gray"):
            assert max(red, green, blue) - min(red, green, blue) < 40, (key, colour)
        by_colour.setdefault(colour, set()).add(key)
    assert set(by_colour) == set(COLOURS)


def test_images_with_an_open_scene_are_only_left_out_of_captions_and_text(built):
    for split in ("train", "test"):
        vqa, captions, text = (set(samples(built[0], name, split)) for name in ("vqa", "captions", "text"))
        assert captions == text < vqa
        assert len(captions) > 0.85 * len(vqa)


def test_text_asks_the_same_questions_each_with_the_scene_in_words(built):
    vqa, captions, text = (samples(built[0], name, "test") for name in ("vqa", "captions", "text"))
    used: Counter[int] = Counter()
    for key, sample in text.items():
        assert "png" not in sample
        _, colour, shape = turns(captions[key])[0][1].split()
        sentences = [template.format(colour=colour, shape=shape) for template in SCENES]
        expected = [(q.removeprefix("<image>\n"), a) for q, a in turns(vqa[key])]
        expected.append(("describe the image.", f"a {colour} {shape}"))
        found = turns(sample)
        assert len(found) == len(expected)
        for (question, answer), (wanted, wanted_answer) in zip(found, expected, strict=True):
            assert answer == wanted_answer
            number = next(i for i, sentence in enumerate(sentences) if question == f"{sentence} {wanted}")
            used[number] += 1
    assert len(used) == len(SCENES)
    assert min(used.values()) > 0.5 * sum(used.values()) / len(SCENES)


def test_scene_sentences_are_of_clearly_different_lengths():
    lengths = sorted(len(template.split()) for template in SCENES)
    assert len(set(lengths)) >= 6
    assert lengths[-1] > 4 * lengths[0]
    assert all("{colour}" in template and "{shape}" in template for template in SCENES)


def test_the_tokenizer_knows_every_word_of_both_splits(built):
    tokenizer = AutoTokenizer.from_pretrained(built[0] / "tokenizer", local_files_only=True)
    texts = {
        text.replace("<image>", "")
        for name in ("captions", "vqa", "text")
        for split in ("train", "test")
        for sample in samples(built[0], name, split).values()
        for pair in turns(sample)
        for text in pair
    }
    assert not any(
        tokenizer.unk_token_id in ids for ids in tokenizer(sorted(texts), add_special_tokens=False)["input_ids"]
    )
    assert "<image>" not in tokenizer.get_vocab()


def test_building_twice_gives_the_same_bytes_and_replaces_what_was_there(built, tmp_path):
    shutil.copytree(built[0], tmp_path / "again")
    (tmp_path / "again/vqa/test/stale.tar").write_bytes(b"old")
    build_easy_vqa(tmp_path / "again")
    first, again = (
        sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) for root in (built[0], tmp_path / "again")
    )
    assert first == again
    assert all((built[0] / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in first)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize(
    ("questions", "scene"),
    [
        ([("what is the red shape?", "circle")], ("red", "circle")),
        ([("what is the color of the triangle?", "teal")], ("teal", "triangle")),
        ([("what color is the shape?", "blue"), ("what shape is present?", "circle")], ("blue", "circle")),
        ([("is there a red shape?", "yes"), ("is no circle present?", "no")], ("red", "circle")),
        ([("is there not a red shape?", "no"), ("does the image not contain a circle?", "no")], ("red", "circle")),
        (
            [
                ("what color is the shape?", "red"),
                ("is there a circle?", "no"),
                ("does the image not contain a triangle?", "yes"),
            ],
            ("red", "rectangle"),
        ),
        (
            [(f"is a {c} shape present?", "no") for c in COLOURS[1:]] + [("is a circle present?", "yes")],
            ("black", "circle"),
        ),
        ([("what color is the shape?", "red"), ("is there a circle?", "no")], None),
        ([], None),
    ],
)
def test_scenes_follow_from_answers(questions, scene):
    assert derive_scene(questions) == (Scene(*scene) if scene else None)


def test_contradictions_and_gaps_in_the_package_are_errors():
    with pytest.raises(UserError, match="contradict"):
        derive_scene([("what color is the shape?", "red"), ("is there a red shape?", "no")])
    broken = types.SimpleNamespace(
        get_train_questions=lambda: (["q"], ["a"], [0]), get_train_image_paths=lambda: {0: "x", 1: "y"}
    )
    with pytest.raises(UserError, match=r"differ at \[1\]"):
        read_split(broken, "train")


def test_the_missing_package_is_told_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(UserError, match="pip install easy-vqa"):
        build_easy_vqa(tmp_path / "out")


@pytest.mark.slow
def test_no_picture_of_the_test_split_is_in_another() -> None:
    seen = {
        split: {Image.open(picture.path).convert("RGB").tobytes() for picture in pictures_of(package, split)}
        for split in ("train", "val", "test")
    }
    assert [len(pixels) for pixels in seen.values()] == [3800, 200, 1000]
    assert not seen["test"] & (seen["train"] | seen["val"])
    assert not seen["val"] & seen["train"]
