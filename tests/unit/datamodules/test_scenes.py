from __future__ import annotations

import io
import json
import re
from collections import Counter, defaultdict

import pytest
import webdataset
from PIL import Image
from transformers import AutoTokenizer

from datamodules.command import main
from datamodules.scene_questions import COLOURS, KINDS, SHAPES
from datamodules.scenes import SENTENCES, build_scenes, pictures
from moextend_pl.contracts import UserError

IMAGES = 200
WORDS_OF = {"small": "size", "large": "size", **dict.fromkeys(COLOURS, "color"), **dict.fromkeys(SHAPES, "shape")}
# Measured on paper: what a pure paint looks like, without looking at how it was drawn.
PURE = {
    "blue": (0, 0, 255),
    "green": (0, 128, 0),
    "red": (255, 0, 0),
    "yellow": (255, 210, 0),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "data"
    build_scenes(out, IMAGES, samples_per_shard=60)
    return out


def samples(out, name, split):
    urls = [str(path) for path in sorted((out / name / split).glob("*.tar"))]
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)}


def turns(sample):
    values = [turn["value"] for turn in json.loads(sample["json"])["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def told(text):
    """Reads things out of a description: every place is named before its thing."""
    found = {}
    for row, column, size, colour, shape in re.findall(r"(top|bottom) (left|right):? (small|large) (\w+) (\w+)", text):
        found[row, column] = {"size": size, "color": colour, "shape": shape, "row": row, "column": column}
    return found


def meant(things, words):
    """The only thing that has all of these colours and shapes."""
    wanted = [word for word in words if WORDS_OF.get(word) in ("color", "shape")]
    (thing,) = [thing for thing in things.values() if set(wanted) <= set(thing.values())]
    return thing


def answer(things, question):
    """Answers from the words of the question alone, by a way of its own."""
    words = re.findall(r"[a-z]+", question)
    if question.startswith("how many"):
        word = {"circles": "circle", "squares": "square", "triangles": "triangle"}.get(words[2])
        return ["zero", "one", "two", "three"][sum((word or words[2]) in thing.values() for thing in things.values())]
    if question.startswith("is there a"):
        colour, shape = words[3:]
        return "yes" if any((t["color"], t["shape"]) == (colour, shape) for t in things.values()) else "no"
    if question.startswith("what"):
        if "at" in words:
            return things[words[-2], words[-1]][words[1]]
        return meant(things, words[2:])[words[1]]
    asked = "row" if "top" in words else "column" if "left" in words else "size"
    return meant(things, words)[asked]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_answer_follows_from_the_description(scenes, split):
    number = 0
    for sample in samples(scenes, "text", split).values():
        *asked, (prompt, listing) = turns(sample)
        assert prompt.endswith(" describe the image.")
        assert told(listing) == told(prompt)
        for text, reply in asked:
            description, question = re.fullmatch(r"(.*[.]) ([^.]+\?)", text).groups()
            assert answer(told(description), question) == reply, text
            number += 1
    assert number >= 100


def test_pictures_captions_and_texts_of_a_key_tell_of_the_same_scene(scenes):
    vqa, captions, text = (samples(scenes, name, "test") for name in ("vqa", "captions", "text"))
    assert vqa.keys() == captions.keys() == text.keys()
    for key, sample in vqa.items():
        ((question, listing),) = turns(captions[key])
        assert question == "<image>\ndescribe the image."
        assert sample["png"] == captions[key]["png"]
        asked = [(q.removeprefix("<image>\n"), a) for q, a in turns(sample)]
        things = told(listing)
        assert [(q, answer(things, q)) for q, _ in asked] == asked
        assert all(told(q) == things for q, _ in turns(text[key]))
        assert "png" not in text[key]


def test_pictures_show_the_colours_and_sizes_that_their_captions_name(scenes):
    checked = Counter()
    for sample in samples(scenes, "captions", "train").values():
        image = Image.open(io.BytesIO(sample["png"])).convert("RGB")
        assert image.size == (64, 64)
        things = told(turns(sample)[0][1])
        assert 2 <= len(things) <= 3
        ground = image.getpixel((32, 32))
        for row, y in (("top", 0), ("bottom", 32)):
            for column, x in (("left", 0), ("right", 32)):
                spots = [(x + i, y + j) for i in range(32) for j in range(32)]
                apart = {spot: sum(abs(a - b) for a, b in zip(image.getpixel(spot), ground)) for spot in spots}
                drawn = [spot for spot in spots if apart[spot] > 90]
                if (row, column) not in things:
                    assert not drawn
                    continue
                thing = things[row, column]
                paint = Counter(map(image.getpixel, drawn)).most_common(1)[0][0]
                near = min(PURE, key=lambda name: sum((a - b) ** 2 for a, b in zip(PURE[name], paint, strict=True)))
                assert near == thing["color"], (paint, thing)
                width = max(i for i, _ in drawn) - min(i for i, _ in drawn) + 1
                assert (width > 15) == (thing["size"] == "large"), (width, thing)
                checked[thing["shape"]] += 1
    assert set(checked) == set(SHAPES)


def test_no_scene_is_in_two_splits(scenes):
    listings = [
        turns(sample)[0][1]
        for split in ("train", "val", "test")
        for sample in samples(scenes, "captions", split).values()
    ]
    assert len(listings) == len(set(listings)) == IMAGES
    sizes = [len(samples(scenes, "vqa", split)) for split in ("train", "val", "test")]
    assert sizes == [150, 10, 40]


def test_no_answer_of_a_kind_is_much_more_frequent_than_the_others():
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for picture in pictures(1500, seed=3):
        assert len(set(picture.questions)) == len(picture.questions) == 10
        for kind, questions in KINDS.items():
            pairs = set(questions(picture.scene))
            counts[kind].update(reply for question, reply in picture.questions if (question, reply) in pairs)
    assert counts.keys() == KINDS.keys()
    for kind, found in counts.items():
        total = sum(found.values())
        assert total > 600, kind
        fair = 1 / len(found)
        assert max(found.values()) / total < 1.45 * fair, (kind, found)


def test_blind_guessing_stays_below_half(scenes):
    """The most frequent answer to each question, learned from train, is the best that a blind model can say."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples(scenes, "vqa", "train").values():
        for question, reply in turns(sample):
            seen[question.removeprefix("<image>\n")][reply] += 1
    asked = [pair for sample in samples(scenes, "vqa", "test").values() for pair in turns(sample)]
    right = [
        reply == seen[question.removeprefix("<image>\n")].most_common(1)[0][0]
        for question, reply in asked
        if question.removeprefix("<image>\n") in seen
    ]
    assert len(right) > 300
    assert sum(right) / len(right) < 0.5


def test_building_twice_gives_the_same_bytes_and_another_seed_other_scenes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_scenes(tmp_path / name, 20, seed)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 18
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    first, other = ({turns(s)[0][1] for s in samples(tmp_path / n, "captions", "train").values()} for n in "ac")
    assert len(first & other) < len(first) / 2


def test_a_scene_does_not_depend_on_how_many_pictures_are_drawn():
    assert list(pictures(5, seed=0)) == list(pictures(50, seed=0))[:5]


def test_the_tokenizer_knows_every_word_also_of_few_pictures(scenes, tmp_path):
    build_scenes(tmp_path / "few", 20)
    texts = {
        text.replace("<image>", "")
        for name in ("captions", "vqa", "text")
        for split in ("train", "val", "test")
        for sample in samples(scenes, name, split).values()
        for pair in turns(sample)
        for text in pair
    }
    for out in (scenes, tmp_path / "few"):
        tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer", local_files_only=True)
        for ids in tokenizer(sorted(texts), add_special_tokens=False)["input_ids"]:
            assert tokenizer.unk_token_id not in ids


def test_sentences_are_of_different_lengths():
    assert len({len(sentence.split()) for sentence in SENTENCES}) == len(SENTENCES) > 2


def test_the_command_builds_the_sets_that_check_accepts(tmp_path, capsys):
    assert main(["build", "scenes", "--out", str(tmp_path / "data"), "--images", "40", "--seed", "2"]) == 0
    out = capsys.readouterr().out
    assert "vqa/train: 1 shards, 30 samples, 30 images, 300 turns" in out
    assert "text/test: 1 shards, 8 samples, 0 images, 88 turns" in out
    assert main(["check", str(tmp_path / "data/vqa/test")]) == 0


@pytest.mark.parametrize("images", [0, 19, 20_001])
def test_a_number_of_images_out_of_range_is_refused(images, tmp_path):
    with pytest.raises(UserError, match=r"--images` from 20 to 20000"):
        build_scenes(tmp_path / "out", images)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="it holds something else"):
        build_scenes(tmp_path, 20)
    assert (tmp_path / "notes.txt").read_text() == "mine"
