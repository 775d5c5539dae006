from __future__ import annotations

import io
import json
import os
import signal

import numpy as np
import pytest
import webdataset
from PIL import Image

from datamodules import llava as llava_module
from datamodules.index import load_index
from datamodules.llava import BuildOptions, build_from_llava
from datamodules.llava_entries import unique_keys
from datamodules.reader import ShardReader
from datamodules.shards import conversation
from moextend_pl.contracts import UserError
from moextend_pl.samples.pixels import decode_image

TURNS = conversation(("<image>\nwhat?", "this"))


def llava(tmp_path, items):
    (tmp_path / "data.json").write_text(json.dumps(items))
    return tmp_path / "data.json", tmp_path, tmp_path / "out"


def test_llava_json_becomes_shards(tmp_path, picture):
    (tmp_path / "one.png").write_bytes(picture(1))
    (tmp_path / "two.txt").write_bytes(picture(2, kind="JPEG"))  # a wrong name; the content decides
    two = conversation(("<image><image> which?", "both"))
    items = [
        {"id": "a", "image": "one.png", "conversations": TURNS},
        {"id": 7, "image": ["one.png", "two.txt"], "conversations": two},
        {"id": "c", "conversations": conversation(("hello", "you"))},
    ]
    build_from_llava(*llava(tmp_path, items))
    found = list(webdataset.WebDataset(str(tmp_path / "out/00000.tar"), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == ["a", "7", "c"]
    assert found[1]["0.png"] == picture(1)
    assert found[1]["1.jpg"] == picture(2, kind="JPEG")
    assert json.loads(found[1]["json"])["conversations"] == two


def test_all_mistakes_of_a_llava_json_are_told_at_once_and_nothing_is_written(tmp_path, picture):
    (tmp_path / "one.png").write_bytes(picture(1))
    (tmp_path / "cut.png").write_bytes(picture(1)[:-30])
    items = [
        {"id": "missing", "image": "none.png", "conversations": TURNS},
        {"id": "count", "image": ["one.png", "one.png"], "conversations": TURNS},
        {"id": "odd", "image": "one.png", "conversations": [*TURNS, TURNS[1]]},
        {"id": "empty", "image": "one.png", "conversations": conversation(("<image>\nwhat?", ""))},
        {"id": "fine", "image": "one.png", "conversations": TURNS},
        {"id": "fine", "image": "one.png", "conversations": TURNS},
        {"id": "broken", "image": "cut.png", "conversations": TURNS},
        {"id": "outside", "image": "../one.png", "conversations": TURNS},
        {"id": 1.5, "image": "one.png", "conversations": TURNS},
        "no entry",
    ]
    with pytest.raises(UserError) as caught:
        build_from_llava(*llava(tmp_path, items))
    text = str(caught.value)
    expected = ["found no file", "1 `<image>` in the text for 2", "even number", "expected a text"]
    for sentence in [*expected, "cut short", "'../one.png'", "expected `id`", "expected an object", "9 problem(s)"]:
        assert sentence in text
    assert "entry 4" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.png", "data.json", "one.png"]


def test_at_most_twenty_mistakes_are_listed_and_the_rest_counted(tmp_path):
    items = [{"id": f"x{i}", "conversations": []} for i in range(33)]
    with pytest.raises(UserError, match="33 problem") as caught:
        build_from_llava(*llava(tmp_path, items))
    assert str(caught.value).count("entry ") == 20
    assert "13 more" in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff\xfe"])
def test_an_unusable_llava_json_is_refused(tmp_path, content):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data.json"):
        build_from_llava(tmp_path / "data.json", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="cwd"):
        build_from_llava(tmp_path / "none.json", tmp_path, tmp_path / "out")


def test_a_missing_folder_of_images_is_told_once_and_not_for_every_entry(tmp_path):
    annotations, _, out = llava(tmp_path, [{"id": "a", "image": "x.png", "conversations": TURNS}])
    with pytest.raises(UserError, match=r"folder of images at .*none, found none"):
        build_from_llava(annotations, tmp_path / "none", out)


def test_a_folder_with_other_things_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    items = [{"id": "a", "conversations": conversation(("q", "a"))}]
    with pytest.raises(UserError, match="something else"):
        build_from_llava(*llava(tmp_path, items))
    assert (tmp_path / "out/thesis.tex").read_text() == "years of work"
    (tmp_path / "out/thesis.tex").unlink()
    build_from_llava(*llava(tmp_path, items))  # an empty folder, then one of ours, may be replaced
    build_from_llava(*llava(tmp_path, items))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "out"]


def noisy(side, kind="JPEG", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side * 2, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def many(tmp_path, picture, count=23):
    for number in range(count):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    items = [{"id": f"k{n}", "image": f"{n}.png", "conversations": TURNS} for n in range(count)]
    items[3] = {"id": "k3", "conversations": conversation(("hello", "you"), ("and", "again"))}
    return llava(tmp_path, items)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [2, 5])
def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, picture, workers):
    annotations, images, out = many(tmp_path, picture)
    build_from_llava(annotations, images, out, BuildOptions(4))
    build_from_llava(annotations, images, tmp_path / "other", BuildOptions(4, workers))
    assert len(contents(out)) == 6 + 2
    assert contents(out) == contents(tmp_path / "other")


def test_ids_that_stand_twice_get_numbers_and_are_counted(tmp_path):
    identities = ["a", "a", "a-2", "b", "a", "b.c", "b_c", 7, "7"]
    items = [{"id": identity, "conversations": conversation(("q", "a"))} for identity in identities]
    built = build_from_llava(*llava(tmp_path, items))
    keys = [key for shard in built.shards for key in shard.keys]
    assert keys == ["a", "a-3", "a-2", "b", "a-4", "b_c", "b_c-2", "7", "7-2"]
    assert built.renamed == 5


def test_thousands_of_equal_ids_take_no_time():
    keys, renamed = unique_keys([{"id": "x"}] * 50_000)
    assert len(set(keys)) == 50_000
    assert renamed == 49_999


def test_larger_images_are_shrunk_as_training_would_and_sizes_are_told(tmp_path):
    (tmp_path / "large.jpg").write_bytes(noisy(100))
    (tmp_path / "small.png").write_bytes(noisy(8, "PNG"))
    items = [
        {"id": "a", "image": ["large.jpg", "small.png"], "conversations": conversation(("<image><image>?", "yes"))}
    ]
    built = build_from_llava(*llava(tmp_path, items), BuildOptions(resize=32, square=True, quality=100))
    large, small = ShardReader(tmp_path / "out").read(0).images
    assert small == noisy(8, "PNG")  # one that is small enough stays as it is
    found = Image.open(io.BytesIO(large))
    assert (found.format, found.size) == ("JPEG", (32, 32))
    expected = Image.open(io.BytesIO(noisy(100))).resize((32, 32), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected))
    assert difference.mean() < 12  # noise is the hardest picture for a JPEG
    assert built.done.bytes_before == len(noisy(100)) + len(small)
    assert built.done.bytes_after == len(large) + len(small)
    lower = build_from_llava(*llava(tmp_path, items), BuildOptions(resize=32, square=True, quality=30))
    assert lower.done.bytes_after < built.done.bytes_after
    build_from_llava(
        *llava(tmp_path, items), BuildOptions(resize=32)
    )  # proportions are kept unless a square is asked for
    assert Image.open(io.BytesIO(ShardReader(tmp_path / "out").read(0).images[0])).size == (64, 32)


def test_bad_entries_are_left_out_on_demand_and_listed(tmp_path, picture):
    annotations, images, out = many(tmp_path, picture)
    for number in (0, 1, 2, 3, 9):
        (tmp_path / f"{number}.png").write_bytes(b"damaged")
    built = build_from_llava(annotations, images, out, BuildOptions(4, skip_bad=True))
    keys = [key for shard in built.shards for key in shard.keys]
    assert keys == [f"k{n}" for n in range(23) if n not in (0, 1, 2, 9)]  # k3 is text
    listed = [json.loads(line)["problem"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [text.split(":")[0] for text in listed] == [f"entry {n} (id 'k{n}')" for n in (0, 1, 2, 9)]
    build_from_llava(annotations, images, out, BuildOptions(4, skip_bad=True))  # still a folder of ours


def test_a_build_that_leaves_everything_out_tells_why_and_works_once_the_images_are_mended(tmp_path, picture):
    items = [{"id": f"k{n}", "image": f"{n}.png", "conversations": TURNS} for n in range(2)]
    annotations, images, out = llava(tmp_path, items)
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(b"damaged")
    options = BuildOptions(4, skip_bad=True)
    with pytest.raises(UserError, match=r"2 problem.*no entry is left") as caught:
        build_from_llava(annotations, images, out, options)
    assert "entry 1 (id 'k1'): 1.png" in str(caught.value)
    assert not (tmp_path / ".out.part").exists()
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    assert len(build_from_llava(annotations, images, out, options).shards[0]) == 2


@pytest.mark.parametrize("skip_bad", [False, True])
def test_an_image_mended_after_a_stopped_build_is_read_again(tmp_path, picture, skip_bad):
    annotations, images, out = many(tmp_path, picture)
    (tmp_path / "1.png").write_bytes(b"damaged")

    def interrupt(done, total):
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_from_llava(annotations, images, out, BuildOptions(4, skip_bad=skip_bad), interrupt)
    assert [path.name for path in (tmp_path / ".out.part").glob("*.done")] == ["00001.done"]
    many(tmp_path, picture)
    built = build_from_llava(annotations, images, out, BuildOptions(4, skip_bad=skip_bad))
    assert built.done.problems == []
    assert len(built.shards[0]) == 4


def test_a_killed_build_goes_on_where_it_was_and_gives_the_same_bytes(tmp_path, picture):
    annotations, images, out = many(tmp_path, picture)
    child = os.fork()
    if child == 0:

        def stop(done, total):
            if done >= 12:
                os.kill(os.getpid(), signal.SIGKILL)

        build_from_llava(annotations, images, out, BuildOptions(4), stop)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    partial = tmp_path / ".out.part"
    assert not out.exists()
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert sorted(finished) == ["00000.tar", "00001.tar", "00002.tar"]
    build_from_llava(annotations, images, out, BuildOptions(4))
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert not partial.exists()
    build_from_llava(annotations, images, tmp_path / "whole", BuildOptions(4))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("stop_in", ["_finish", "_build_shard"])
def test_what_another_build_left_is_not_mixed_in(tmp_path, picture, monkeypatch, stop_in):
    annotations, images, out = many(tmp_path, picture)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"datamodules.llava.{stop_in}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_from_llava(annotations, images, out, BuildOptions(4))
    build_from_llava(annotations, images, out, BuildOptions(5))  # other options: nothing of it is used
    assert [len(shard) for shard in load_index(out)] == [5, 5, 5, 5, 3]


def test_two_builds_of_one_folder_do_not_meet(tmp_path, picture):
    annotations, images, out = many(tmp_path, picture)

    def second(done, total):
        with pytest.raises(UserError, match="Another process"):
            build_from_llava(annotations, images, out, BuildOptions(4))

    build_from_llava(annotations, images, out, BuildOptions(4), second)
    assert len(load_index(out)) == 6


def test_a_worker_that_dies_is_told_and_what_is_finished_is_kept(tmp_path, picture, monkeypatch):
    annotations, images, out = many(tmp_path, picture)
    whole = llava_module._build_shard

    def die(job):
        if job.path.name == "00003.tar":
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(job)

    monkeypatch.setattr(llava_module, "_build_shard", die)
    monkeypatch.setattr(die, "__qualname__", "_build_shard", raising=False)
    monkeypatch.setattr(die, "__module__", "datamodules.llava", raising=False)
    with pytest.raises(UserError, match="fewer workers"):
        build_from_llava(annotations, images, out, BuildOptions(4, 2))
    assert (tmp_path / ".out.part").is_dir()


@pytest.mark.parametrize(
    "wrong", [{"samples_per_shard": 0}, {"workers": 0}, {"resize": 0}, {"quality": 0}, {"quality": 101}]
)
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        BuildOptions(**wrong)


def test_pictures_of_phones_are_jpegs(tmp_path):
    stream = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(stream, "MPO", save_all=True, append_images=frames[1:])
    (tmp_path / "phone.jpg").write_bytes(stream.getvalue())
    build_from_llava(*llava(tmp_path, [{"id": "a", "image": "phone.jpg", "conversations": TURNS}]))
    raw = ShardReader(tmp_path / "out").read(0)
    assert decode_image(raw.images[0], "x").getpixel((4, 4))[0] > 200
