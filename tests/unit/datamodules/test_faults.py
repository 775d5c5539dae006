"""Rows of the matrices of faults in data; every test names its row."""

from __future__ import annotations

import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.faulty_shards import bomb, conversation_json, encoded, plain_image, write_tar
from PIL import Image

from datamodules import ImageTextShards
from datamodules.index import ARRAYS_FILE, INDEX_FILE, load_index
from datamodules.reader import ShardReader
from datamodules.scan import build_index, index_shard
from datamodules.shards import Entry, conversation, write_shards
from moextend_pl.contracts import IGNORE_INDEX, UserError
from moextend_pl.samples.pixels import decode_image

GOOD = [("good.json", conversation_json()), ("good.png", plain_image(1))]


def rank(folder, spec, number, world, run, **options):
    """A data module as a trainer of several processes would hold it."""
    module = ImageTextShards(train=str(folder), spec=spec, **{"batch_size": 4, **options})
    module.trainer = SimpleNamespace(
        global_rank=number,
        world_size=world,
        default_root_dir=str(run),
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0)))
        ),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )
    module.setup("fit")
    return module


def batches(module, count):
    loader = iter(module.train_dataloader())
    return [next(loader) for _ in range(count)]


def bad_lines(run):
    path = run / "bad_samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture
def tar_folder(tmp_path):
    """Makes a folder with one shard of given members and its index."""

    def make(members, **options):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        write_tar(folder / "0.tar", members, **options)
        build_index(folder, faults=[])
        return folder

    return make


SIZES = (1, 50, 7, 13, 2, 29, 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_row_17_uneven_shards_end_for_both_ranks_and_show_each_sample_once(tmp_path, spec, workers):
    numbers = iter(range(sum(SIZES)))
    for shard, size in enumerate(SIZES):
        members = [(f"k{next(numbers):03d}.json", conversation_json("what ?")) for _ in range(size)]
        write_tar(tmp_path / f"{shard}.tar", members)
    build_index(tmp_path)
    steps = sum(SIZES) // 4
    options = {"num_workers": workers, "eval_batch_size": 6, "val": str(tmp_path)}
    ranks = [rank(tmp_path, spec, number, 2, tmp_path, **options) for number in range(2)]
    seen = [[batch["keys"] for batch in batches(module, steps)] for module in ranks]
    assert {len(keys) for rank_keys in seen for keys in rank_keys} == {2}
    assert sorted(key for keys in seen for batch in keys for key in batch) == [f"k{n:03d}" for n in range(sum(SIZES))]
    validated = [[batch["keys"] for batch in module.val_dataloader()] for module in ranks]
    assert len(validated[0]) == len(validated[1])
    keys = [key for rank_keys in validated for batch in rank_keys for key in batch if key]
    assert sorted(keys) == [f"k{n:03d}" for n in range(sum(SIZES))]


def pairs_of(folder):
    """Colour number and text of each sample that can be read; samples that cannot are None."""
    found = []
    reader = ShardReader(folder)
    for number in range(len(reader)):
        try:
            raw = reader.read(number)
            image = decode_image(raw.images[0], raw.origin)
            found.append((image.getpixel((0, 0))[0], raw.turns[0].gpt))
        except UserError:
            found.append(None)
    return found


CUTS = {
    "in a header": lambda members: members[4][0] - 512 + 100,
    "between members": lambda members: members[4][0] - 512,
    "in an image": lambda members: members[4][0] + 40,
    "in a text": lambda members: members[5][0] + 40,
    "a bit of a header": None,
}


@pytest.mark.parametrize("cut", CUTS)
def test_row_18_a_cut_tar_is_refused_and_never_pairs_image_and_caption_of_two_samples(tmp_path, cut):
    for shard in (0, 1):  # the next shard has the same keys, as sets of many writers do
        members = []
        for n in range(4):
            number = 10 * shard + n
            members += [(f"k{n}.png", plain_image(number)), (f"k{n}.json", conversation_json(answer=str(number)))]
        (tmp_path / str(shard)).mkdir()
        write_tar(tmp_path / str(shard) / "0.tar", members)
        build_index(tmp_path / str(shard))
    path = tmp_path / "0" / "0.tar"
    whole = path.read_bytes()
    places = index_shard(path).members[:, 1:].tolist()
    data = bytearray(whole)
    if CUTS[cut] is None:
        data[places[4][0] - 512 + 150] ^= 1
        damaged = bytes(data)
    else:
        damaged = whole[: CUTS[cut](places)]
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"0.tar: not a whole plain tar file: byte \d+"):
        index_shard(path)
    if len(damaged) != len(whole):
        with pytest.raises(UserError, match=f"0.tar: the index says {len(whole)} bytes, the file has {len(damaged)}"):
            ShardReader(tmp_path / "0")
    # As large as before, by chance or by a download that was prepared in its full size.
    path.write_bytes(damaged.ljust(len(whole), b"\0"))
    found = pairs_of(tmp_path / "0")
    assert found[:2] == [(0, "0"), (1, "1")]
    assert None in found
    assert all(pair is None or pair[1] == str(pair[0]) for pair in found)


def test_row_18_a_shard_that_changed_places_with_another_pairs_nothing(tmp_path):
    for shard in (0, 1):
        names = [f"k{n}" for n in range(4)] if shard == 0 else [f"x{n}" for n in range(4)]
        members = []
        for n, name in enumerate(names):
            members += [(f"{name}.png", plain_image(n)), (f"{name}.json", conversation_json(answer=str(n)))]
        write_tar(tmp_path / f"{shard}.tar", members)
    build_index(tmp_path)
    other = (tmp_path / "1.tar").read_bytes()
    assert len(other) == (tmp_path / "0.tar").stat().st_size
    (tmp_path / "0.tar").write_bytes(other)
    assert pairs_of(tmp_path)[:4] == [None] * 4
    with pytest.raises(UserError, match=r"0.tar: k0: expected the header of k0.png"):
        ShardReader(tmp_path).read(0)


BAD = {
    "jpeg": [("b.json", conversation_json()), ("b.jpg", plain_image(3, (40, 40), "JPEG")[:200])],
    "bomb": [("b.json", conversation_json()), ("b.png", None)],
    "text": [("b.png", plain_image())],
    "caption": [("b.txt", b" \n"), ("b.png", plain_image())],
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_row_19_bad_samples_become_placeholders_within_the_budget_and_stop_the_run_beyond(
    tmp_path, spec, workers, world
):
    members = []
    for number, (name, sample) in enumerate(BAD.items()):
        members += [(f"{name}.{file.partition('.')[2]}", bomb() if data is None else data) for file, data in sample]
        members += [(f"good{number}.json", conversation_json()), (f"good{number}.png", plain_image(number))]
    folder, run = tmp_path / "set", tmp_path / "run"
    folder.mkdir()
    write_tar(folder / "0.tar", members)
    build_index(folder, faults=[])

    def ledger(budget, run):
        ranks = [
            iter(rank(folder, spec, n, world, run, num_workers=workers, max_bad_samples=budget).train_dataloader())
            for n in range(world)
        ]
        return [[next(loader) for loader in ranks] for _ in range(4)]  # two epochs

    steps = ledger(4, run)
    for step in steps:
        for batch in step:
            learned = batch["labels"].ne(IGNORE_INDEX).any(dim=1).tolist()
            assert learned == [key.startswith("good") for key in batch["keys"]]
            assert len(batch["pixel_values"]) == sum(learned)
    keys = [key for step in steps[:2] for batch in step for key in batch["keys"]]
    assert sorted(keys) == sorted([*BAD, *(f"good{n}" for n in range(4))])
    lines = bad_lines(run)
    assert {line["key"]: line["shard"] for line in lines} == dict.fromkeys(BAD, str(folder / "0.tar"))
    reasons = {line["key"]: line["reason"] for line in lines}
    assert "Pillow says" in reasons["jpeg"]
    assert "64000000 pixels" in reasons["bomb"]
    assert "no KEY.json and no KEY.txt" in reasons["text"]
    assert "caption" in reasons["caption"]
    with pytest.raises(UserError, match="at most 3 bad sample.*met 4") as caught:
        ledger(3, tmp_path / "second")
    assert all(f"0.tar: {name}: " in str(caught.value) for name in BAD)


@pytest.mark.parametrize("place", ["data/train-*", "data/{a,b}", "data/tarin"])
def test_row_21_a_pattern_or_a_wrong_name_tells_the_place_and_where_one_stands(place, spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        ImageTextShards(train=place, spec=spec).setup("fit")
    assert place in str(caught.value)
    assert f"cwd {tmp_path}" in str(caught.value)
    assert ("not expanded" in str(caught.value)) == (place != "data/tarin")


def test_row_23_fewer_shards_than_ranks_and_empty_shards_are_no_fault(tmp_path, spec):
    write_tar(tmp_path / "0.tar", [])
    write_tar(tmp_path / "1.tar", [(f"k{n}.json", conversation_json("what ?")) for n in range(3)])
    build_index(tmp_path)
    assert [len(shard) for shard in load_index(tmp_path)] == [0, 3]
    ranks = [iter(rank(tmp_path, spec, n, 4, tmp_path).train_dataloader()) for n in range(4)]
    keys = [key for _ in range(3) for loader in ranks for key in next(loader)["keys"]]
    assert sorted(keys) == sorted([f"k{n}" for n in range(3)] * 4)


def test_row_23_a_set_without_samples_is_told(tmp_path):
    write_tar(tmp_path / "0.tar", [])
    with pytest.raises(UserError, match="found 1 shard.s. with none"):
        build_index(tmp_path)


def test_row_24_a_missing_index_names_the_command(tmp_path):
    write_tar(tmp_path / "0.tar", GOOD)
    with pytest.raises(UserError, match=r"a folder without it.*shards index"):
        ShardReader(tmp_path)


def test_row_24_a_stale_index_names_the_shard_and_both_sizes(folder):
    path = folder / "00001.tar"
    size = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(bytes(512))
    with pytest.raises(UserError, match=f"00001.tar.*{size} bytes.*{size + 512}.*shards index"):
        ShardReader(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"00001.tar.*no such file"):
        ShardReader(folder)


def test_row_24_an_index_whose_two_files_do_not_belong_together_names_the_command(folder, tmp_path, entry):
    (tmp_path / "other").mkdir()
    write_shards([entry(i) for i in range(11)], tmp_path / "other", 5)
    (folder / ARRAYS_FILE).write_bytes((tmp_path / "other" / ARRAYS_FILE).read_bytes())
    with pytest.raises(UserError, match=r"index.safetensors.*shards index"):
        load_index(folder)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([*GOOD, ("/etc/x.json", conversation_json())], r"0.tar.*|'/etc/x.json'"),
        ([*GOOD, ("a/../../x.json", conversation_json())], r"'a/../../x.json'"),
        ([*GOOD, ("good.json", conversation_json())], r"0.tar: key 'good' stands twice"),
        ([*GOOD, ("x.json", conversation_json()), *GOOD], r"0.tar: key 'good' stands twice"),
    ],
)
def test_row_25_bad_names_and_duplicate_keys_are_refused_with_shard_and_key(tmp_path, members, sentence):
    with pytest.raises(UserError, match=sentence):
        index_shard(write_tar(tmp_path / "0.tar", members))


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_row_25_compressed_tars_are_refused(tmp_path, mode):
    with pytest.raises(UserError, match=r"0.tar: not a whole plain tar file: byte 0"):
        index_shard(write_tar(tmp_path / "0.tar", GOOD, mode))


def test_row_25_a_truncated_tar_names_shard_and_byte(tmp_path):
    path = write_tar(tmp_path / "0.tar", GOOD)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"0.tar.*byte \d+.*cut short"):
        index_shard(path)


TEXTS = {
    "no text": ([("b.png", plain_image())], "no KEY.json and no KEY.txt"),
    "no image": ([("b.json", conversation_json())], "1 `<image>` in the text for 0 image"),
    "not UTF-8": ([("b.json", b"\xff\xfe{}"), ("b.png", plain_image())], "UTF-8"),
    "caption not UTF-8": ([("b.txt", b"\xff\xfe"), ("b.png", plain_image())], "UTF-8"),
    "empty": ([("b.json", b""), ("b.png", plain_image())], "JSON"),
    "empty answer": ([("b.json", conversation_json(answer=" ")), ("b.png", plain_image())], "expected a text"),
    "deep": ([("b.json", b"[" * 100_000), ("b.png", plain_image())], "JSON"),
    "number too long": ([("b.json", b"1" * 10_000), ("b.png", plain_image())], "JSON"),
    "caption is none": ([("b.json", b'{"caption": null}'), ("b.png", plain_image())], "caption"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_row_26_texts_that_cannot_be_used_are_counted_and_told_by_key(tar_folder, spec, tmp_path, name):
    members, sentence = TEXTS[name]
    folder = tar_folder([*members, *GOOD])
    batches(rank(folder, spec, 0, 1, tmp_path / "run", batch_size=2, max_bad_samples=1), 1)
    (line,) = bad_lines(tmp_path / "run")
    assert (line["key"], line["shard"]) == ("b", str(folder / "0.tar"))
    assert sentence in line["reason"]
    with pytest.raises(UserError, match=r"0.tar: b: "):
        batches(rank(folder, spec, 0, 1, tmp_path / "other", batch_size=2, max_bad_samples=0), 1)


def test_row_26_a_conversation_without_a_token_to_learn_is_counted(tar_folder, spec, tmp_path):
    folder = tar_folder([("long.json", conversation_json("what ? " * 50)), ("s.json", conversation_json("what ?"))])
    module = rank(folder, spec, 0, 1, tmp_path / "run", batch_size=2, max_length=20, max_bad_samples=1)
    (batch,) = batches(module, 1)
    assert batch["labels"].ne(IGNORE_INDEX).any(dim=1).tolist() == [key == "s" for key in batch["keys"]]
    (line,) = bad_lines(tmp_path / "run")
    assert line["key"] == "long"
    assert "no supervised token" in line["reason"]


def noise(mode="RGB", size=(40, 30)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


SIXTEEN = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
FINE = {
    "CMYK": ("jpg", encoded(noise("CMYK"), "JPEG")),
    "16 bit": ("png", encoded(SIXTEEN)),
    "one pixel": ("png", encoded(noise(size=(1, 1)))),
    "one column": ("png", encoded(noise(size=(1, 300)))),
    "palette with alpha": ("png", encoded(noise("RGBA").quantize(8))),
    "animated": ("webp", encoded(noise(), "WEBP", save_all=True, append_images=[noise("L").convert("RGB")])),
    "wrong extension": ("jpg", encoded(noise())),
    "capitals": ("JPG", encoded(noise(), "JPEG")),
}
BROKEN = {
    "cut": ("png", encoded(noise())[:-40], "cut short"),
    "cut jpeg": ("jpg", encoded(noise(), "JPEG")[:-200], "cut short"),
    "empty": ("png", b"", "expected an image"),
    "gif": ("png", encoded(noise(), "GIF"), "PNG, JPEG, WEBP"),
    "postscript": ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PNG, JPEG, WEBP"),
}


@pytest.mark.parametrize("name", FINE)
def test_row_27_unusual_images_are_converted(tar_folder, spec, tmp_path, name):
    extension, data = FINE[name]
    folder = tar_folder([("b.json", conversation_json()), (f"b.{extension}", data)])
    (batch,) = batches(rank(folder, spec, 0, 1, tmp_path / "run", batch_size=1, max_bad_samples=0), 1)
    assert batch["pixel_values"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("name", BROKEN)
def test_row_27_images_that_cannot_be_used_are_counted_and_told_by_key(tar_folder, spec, tmp_path, name):
    extension, data, sentence = BROKEN[name]
    folder = tar_folder([("b.json", conversation_json()), (f"b.{extension}", data), *GOOD])
    batches(rank(folder, spec, 0, 1, tmp_path / "run", batch_size=2), 1)
    (line,) = bad_lines(tmp_path / "run")
    assert line["key"] == "b"
    assert sentence in line["reason"]


@pytest.mark.parametrize(("side", "told"), [(9_000, "9000 x 9000"), (20_000, "400000000 pixels")])
def test_row_27_a_bomb_tells_its_size_and_the_limit_and_is_not_decoded(
    tar_folder, spec, tmp_path, monkeypatch, side, told
):
    folder = tar_folder([("b.json", conversation_json()), ("b.png", bomb(side, side))])
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    batches(rank(folder, spec, 0, 1, tmp_path / "run", batch_size=1), 1)
    (line,) = bad_lines(tmp_path / "run")
    assert "at most 64000000 pixels" in line["reason"]
    assert told in line["reason"]


@pytest.mark.parametrize(("marks", "images"), [(2, 1), (1, 2), (0, 1)])
def test_row_28_marks_that_do_not_fit_the_images_are_told_with_both_counts(tar_folder, spec, tmp_path, marks, images):
    members = [("b.json", conversation_json("<image>" * marks + "what ?"))]
    members += [(f"b.{n}.png", plain_image(n)) for n in range(images)]
    folder = tar_folder(members)
    batches(rank(folder, spec, 0, 1, tmp_path / "run", batch_size=1), 1)
    (line,) = bad_lines(tmp_path / "run")
    assert line["key"] == "b"
    assert f"{marks} `<image>` in the text for {images} image(s)" in line["reason"]
    entry = Entry(
        "b", conversation(("<image>" * marks + "what ?", "red")), tuple(plain_image(n) for n in range(images))
    )
    (tmp_path / "own").mkdir()
    write_shards([entry], tmp_path / "own")
    assert (tmp_path / "own" / INDEX_FILE).is_file()
    with pytest.raises(UserError, match=f"{marks} `<image>` in the text for {images}"):
        ShardReader(tmp_path / "own").read(0)


def test_tests_and_predictions_allow_no_bad_sample(tar_folder, spec):
    folder = tar_folder([("b.json", conversation_json()), *GOOD])
    module = ImageTextShards(test={"x": str(folder)}, spec=spec, max_bad_samples=5)
    module.setup("test")
    with pytest.raises(UserError, match=r"0.tar: b: "):
        list(module.test_dataloader()[0])


MALICIOUS = {
    "pickle": ([("a.pickle", b"cos\nsystem\n(S'x'\ntR.")], "expected members named"),
    "pyd": ([("a.json", conversation_json("q")), ("a.pyd", b"x")], "expected members named"),
    "weights": ([("a.pth", b"x")], "expected members named"),
    "svg": ([("a.svg", b"<svg/>")], "expected members named"),
    "backslash": ([("..\\a.json", b"{}")], "refused"),
    "home": ([("~/a.json", b"{}")], "refused"),
    "two images of one name": ([*GOOD, ("good.png", plain_image(2))], "stands twice"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_members_are_refused(tmp_path, name):
    members, sentence = MALICIOUS[name]
    with pytest.raises(UserError, match=sentence):
        index_shard(write_tar(tmp_path / "0.tar", members), faults=[])


@pytest.mark.parametrize("name", ["/etc/passwd.json", "../../x.json", "a/" * 40 + "../" * 50 + "x.json"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_odd_paths_in_extension_headers_are_refused(tmp_path, name, form):
    def deep(info):
        info.name = name
        info.pax_headers = {"path": name}
        return info

    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=form) as tar:
        tar.addfile(deep(tarfile.TarInfo(name)))
    with pytest.raises(UserError, match="Absolute names and `..` are refused"):
        index_shard(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="refused"):
        index_shard(path)


def test_a_picture_that_is_a_program_too_is_a_picture(tar_folder, spec, tmp_path):
    polyglot = encoded(noise()) + b"PK\x03\x04#!/bin/sh\nrm -rf /\n<script>"
    folder = tar_folder([("b.json", conversation_json()), ("b.png", polyglot)])
    (batch,) = batches(rank(folder, spec, 0, 1, tmp_path / "run", batch_size=1, max_bad_samples=0), 1)
    assert len(batch["pixel_values"]) == 1
