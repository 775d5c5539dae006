"""Open scenes: what is drawn is what is told, every answer follows from it, and looking is needed."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from datamodules.command import main
from datamodules.compare import Comparison, compare
from datamodules.open_scenes import PAINTS, PLACES, SHAPES, build_open_scenes, caption, converse, paint, pictures
from datamodules.reader import ShardReader
from datamodules.shards import Entry, conversation, write_shards
from moextend_pl.contracts import UserError


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("open") / "data"
    assert main(["build", "open-scenes", "--out", str(out), "--images", "120"]) == 0
    return out


def told(text: str) -> dict[str, tuple[str, str]]:
    """Reads place -> (colour, shape) out of a caption."""
    things = [part.split() for part in text.rstrip(".").lower().split(", ")]
    return {" ".join(words[-2:]): (words[1], words[2]) for words in things}


def answer(things: dict[str, tuple[str, str]], question: str) -> str:
    """Answers from the words of the question alone."""
    words = question.rstrip("?").lower().split()
    if words[0] == "how":
        return f"{['zero', 'one', 'two', 'three', 'four'][len(things)]}."
    if words[0] == "where":
        return f"at the {next(place for place, (_, shape) in things.items() if shape == words[-1])}."
    if words[1] == "color":
        return f"{next(colour for colour, shape in things.values() if shape == words[-1])}."
    if words[-1] == "shape":
        return f"a {next(shape for colour, shape in things.values() if colour == words[-2])}."
    colour, shape = things[" ".join(words[-2:])]
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}."


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_follows_from_the_caption(built: Path, split: str) -> None:
    captions = ShardReader(built / "captions" / split)
    by_key = {raw.key: raw.turns[0].gpt for raw in (captions.read(n) for n in range(len(captions)))}
    reader = ShardReader(built / "vqa" / split)
    asked = Counter()
    for raw in (reader.read(n) for n in range(len(reader))):
        things = told(by_key[raw.key.split("-")[0]])
        assert len(raw.turns) == 1 or split == "train"
        for turn in raw.turns:
            question = turn.human.removeprefix("<image>\n")
            assert answer(things, question) == turn.gpt.lower()
            asked[question.split()[0]] += 1
    assert set(asked) == {"What", "Where", "How"}


def test_no_answer_of_a_conversation_can_be_read_off_another() -> None:
    kinds = Counter()
    for picture in pictures(200, seed=3):
        rows = converse(picture)
        assert len({pair for row in rows for pair in row}) == sum(map(len, rows))
        for row in rows:
            thing_of = {}
            for place, (question, reply) in enumerate(row):
                words = question.rstrip("?").split()
                if words[0] == "How":
                    assert place == 0  # else the number of questions before it would tell
                    continue
                said = f"{question} {reply}".lower()
                named = (*words, question.rstrip("?").partition("at the ")[2])
                (thing,) = [t for t in picture.scene if {t.shape, t.colour, " ".join(t.place)} & set(named)]
                thing_of.setdefault(thing, said)
                assert thing_of[thing] == said
                kinds[" ".join(words[:2]) + words[-1] * (words[-1] == "shape")] += 1
            assert len(thing_of) == len(picture.scene)
    assert len(kinds) == 4
    assert min(kinds.values()) > 0.15 * kinds.total()


def test_pictures_show_each_thing_in_its_paint_at_its_place() -> None:
    seen = set()
    for picture in pictures(60, seed=5):
        image = Image.open(io.BytesIO(paint(picture))).convert("RGB")
        assert image.size == (64, 64)
        things = {thing.place: thing for thing in picture.scene}
        for place in PLACES:
            x, y = 32 * (place[1] == "right"), 32 * (place[0] == "bottom")
            quarter = image.crop((x, y, x + 32, y + 32))
            ground = image.getpixel((32, 32))
            spots = [quarter.getpixel(spot) for spot in itertools.product(range(32), repeat=2)]
            drawn = [p for p in spots if sum(abs(a - b) for a, b in zip(p, ground, strict=True)) > 60]
            assert bool(drawn) == (place in things)
            if drawn:
                common = Counter(drawn).most_common(1)[0][0]
                near = min(PAINTS, key=lambda n: sum((a - b) ** 2 for a, b in zip(PAINTS[n], common, strict=True)))
                assert near == things[place].colour
                seen.add(things[place].shape)
    assert seen == set(SHAPES)
    assert len({caption(picture.scene) for picture in pictures(300, seed=5)}) == 300


def test_splits_share_no_picture_and_looking_is_needed(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = str(built / "vqa" / "train"), str(built / "vqa" / "test")
    assert main(["compare", train, test, "--json", str(built.parent / "blind.json")]) == 0
    assert "0 of 24 pictures are" in capsys.readouterr().out
    found = compare(train, test)
    assert (found.pictures, found.shared_pictures, found.questions) == (24, 0, 120)
    assert found.blind_accuracy < 0.3


def test_comparison_counts_what_was_seen_and_the_most_frequent_answer(tmp_path: Path) -> None:
    def shards(name: str, *samples: tuple[int, str]) -> Path:
        (tmp_path / name).mkdir()
        entries = []
        for number, (grey, reply) in enumerate(samples):
            stream = io.BytesIO()
            Image.new("RGB", (8, 8), (grey, grey, grey)).save(stream, "PNG")
            entries.append(Entry(f"{number}", conversation(("<image>\nwhich?", reply)), (stream.getvalue(),)))
        write_shards(entries, tmp_path / name, 10)
        return tmp_path / name

    train = shards("train", (1, "a"), (2, "b"), (3, "b"))
    assert compare(train, shards("test", (3, "B"), (9, "a"))) == Comparison(2, 1, 2, 1)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`--images` from 20"):
        build_open_scenes(tmp_path / "out", 3)
