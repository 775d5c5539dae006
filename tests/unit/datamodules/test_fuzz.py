"""Made-up and damaged bytes at every door of the data room: only named errors come out, and memory stays bounded."""

from __future__ import annotations

import io
import json
import resource
import tarfile
from functools import cache

import numpy as np
import pytest
from helpers.faulty_shards import conversation_json, encoded
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.foreign import conversations_of
from datamodules.index import ARRAYS_FILE, INDEX_FILE, file_sha256
from datamodules.reader import ShardReader
from datamodules.scan import build_index
from datamodules.tar import BLOCK
from moextend_pl.contracts import UserError
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import decode_image
from moextend_pl.samples.turns import parse_turns

QUICK, SLOW = 80, 2500  # for each of four doors
MEMORY = 700 * 2**20
"""Decoding an image of the largest allowed size, with alpha, and its copy as RGB; nothing else may need as much."""

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


@cache
def images():
    picture = Image.fromarray(COLOURS)
    return {
        "png": encoded(picture),
        "palette.png": encoded(picture.quantize(4)),
        "16.png": encoded(Image.fromarray(COLOURS[:, :, 0].astype(np.uint16) * 200)),
        "jpg": encoded(picture, "JPEG"),
        "progressive.jpg": encoded(picture, "JPEG", progressive=True),
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "webp": encoded(picture, "WEBP"),
        "lossless.webp": encoded(picture, "WEBP", lossless=True),
        "animated.webp": encoded(picture, "WEBP", save_all=True, append_images=[picture.transpose(1)]),
    }


@cache
def tars():
    """One whole shard of each tar format."""
    members = [("a.json", conversation_json()), ("a.png", images()["png"])]
    members += [("b/c.txt", b"a caption"), ("b/c.jpg", images()["jpg"])]
    members += [("d" * 120 + ".json", conversation_json("<image><image>?"))]
    members += [("d" * 120 + f".{n}.webp", images()["webp"]) for n in range(2)]
    made = []
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        made.append(stream.getvalue())
    return made


NUMBERS = st.sampled_from([b"\0" * 12, b"7" * 11 + b"\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-1".ljust(12, b"\0")])
NAMES = st.sampled_from([b"../x.json", b"/x.json", b"a.pkl", b"a.json", b"\xff\xfe", b"", b"a.json\0b", b"x" * 100])
CHANGES = st.one_of(
    st.tuples(st.just("flip"), st.integers(0), st.integers(1, 255)),
    st.tuples(st.just("put"), st.integers(0), st.binary(max_size=40)),
    st.tuples(st.just("cut"), st.integers(0), st.integers(1, 2000)),
    st.tuples(st.just("end"), st.integers(0), st.just(0)),
    st.tuples(st.just("double"), st.integers(0), st.integers(1, 2000)),
    st.tuples(st.just("size"), st.integers(0), NUMBERS),
    st.tuples(st.just("name"), st.integers(0), NAMES),
    st.tuples(st.just("kind"), st.integers(0), st.binary(min_size=1, max_size=1)),
)
FIELDS = {"size": 124, "name": 0, "kind": 156}


def changed(data, changes):
    """Returns damaged bytes; fields of headers are changed with their checksum, so that they are believed."""
    data = bytearray(data)
    for kind, place, value in changes:
        place %= len(data) + 1
        if kind == "flip" and data:
            data[place % len(data)] ^= value
        elif kind == "put":
            data[place : place + len(value)] = value
        elif kind == "cut":
            del data[place : place + value]
        elif kind == "end":
            del data[place:]
        elif kind == "double":
            data[place:place] = data[place : place + value]
        elif kind in FIELDS:
            start = place // BLOCK * BLOCK
            if len(data) < start + BLOCK:
                continue
            header = bytearray(data[start : start + BLOCK])
            header[FIELDS[kind] : FIELDS[kind] + len(value)] = value
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            data[start : start + BLOCK] = header
    return bytes(data)


def read_all(folder):
    """Reads and decodes every sample; counts those that were whole."""
    reader = ShardReader(folder)
    whole = 0
    try:
        for number in range(len(reader)):
            try:
                raw = reader.read(number)
                for data in raw.images:
                    decode_image(data, raw.origin)
                whole += 1
            except UserError:
                pass
    finally:
        reader.close()
    return whole


@pytest.fixture
def doors(tmp_path, spec):
    """Where bytes of others come in: a strategy for the bytes, and what is done with them."""
    for number, data in enumerate(tars()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "0.tar").write_bytes(data)
        build_index(folder)
        assert read_all(folder) == 3
    originals = {number: (tmp_path / str(number) / INDEX_FILE).read_bytes() for number in (0, 1)}
    arrays = {number: (tmp_path / str(number) / ARRAYS_FILE).read_bytes() for number in (0, 1)}

    def shard(case):
        number, changes, keep_size = case
        folder = tmp_path / str(number)
        data = changed(tars()[number], changes)
        if keep_size:  # read with the index of the whole shard
            data = data[: len(tars()[number])].ljust(len(tars()[number]), b"\0")
        (folder / INDEX_FILE).write_bytes(originals[number])
        (folder / ARRAYS_FILE).write_bytes(arrays[number])
        (folder / "0.tar").write_bytes(data)
        if keep_size:
            read_all(folder)
        build_index(folder, faults=[])
        read_all(folder)

    def index(case):
        number, facts, believed, changes = case
        folder = tmp_path / str(number)
        (folder / "0.tar").write_bytes(tars()[number])
        (folder / ARRAYS_FILE).write_bytes(changed(arrays[number], changes if believed else []))
        data = json.loads(originals[number])
        if believed:  # whoever changed the arrays wrote their digest as well
            path = folder / ARRAYS_FILE
            data["arrays"] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        data["shards"][0].update(facts)
        text = json.dumps(data).encode()
        (folder / INDEX_FILE).write_bytes(text if believed else changed(text, changes))
        read_all(folder)

    encoder = ConversationEncoder(spec)

    def text(case):
        texts, count = case
        encoder.encode("x", parse_turns(conversations_of(texts, count, "x"), count, "x"), [], [])

    def image(case):
        name, changes = case
        decode_image(changed(images()[name], changes), "x")

    changes = st.lists(CHANGES, min_size=1, max_size=4)
    odd = st.one_of(st.integers(), st.text(max_size=5), st.none(), st.lists(st.text(max_size=3), max_size=3))
    names = st.sampled_from(["samples", "bytes", "sha256", "images", "extensions", "name", "turns"])
    facts = st.dictionaries(names, odd, max_size=2)
    return {
        "shard": (st.tuples(st.integers(0, 1), changes, st.booleans()), shard),
        "index": (st.tuples(st.integers(0, 1), facts, st.booleans(), changes), index),
        "text": (st.tuples(texts(), st.integers(0, 3)), text),
        "image": (st.tuples(st.sampled_from(sorted(images())), changes), image),
    }


def texts():
    """Returns texts of a sample: JSON that nearly fits, JSON of any kind, and bytes."""
    leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10))
    value = st.one_of(leaf, st.sampled_from(["<image>", "human", "gpt", "what?", "\0", " "]))
    turn = st.dictionaries(st.sampled_from(["from", "value", "x"]), value, max_size=3)
    near = st.fixed_dictionaries(
        {}, optional={"conversations": st.lists(st.one_of(turn, leaf), max_size=4), "caption": value}
    )
    anything = st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    )
    data = st.one_of(
        st.one_of(near, anything).map(lambda content: json.dumps(content).encode()),
        st.binary(max_size=60),
        st.tuples(st.just(conversation_json()), st.lists(CHANGES, max_size=3)).map(lambda case: changed(*case)),
        st.integers(1, 100_000).map(lambda depth: b"[" * depth),
        st.integers(4000, 9000).map(lambda digits: b"9" * digits),
    )
    # JSON can write halves of a character, which UTF-8 and tokenizers cannot take.
    halves = st.text(st.sampled_from("a ?\n\0\ud83d\udc00"), min_size=1, max_size=6)
    caption = halves.map(lambda text: {"json": json.dumps({"caption": text}).encode()})
    return st.one_of(caption, st.dictionaries(st.sampled_from(["json", "txt"]), data, max_size=2))


def attack(door, examples):
    strategy, target = door
    named = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(case):
        nonlocal named
        try:
            target(case)
        except UserError:
            named += 1

    run()
    # What it took more than ever before in this process.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY
    assert named > examples // 10  # the attack does reach what it attacks


DOORS = ("shard", "index", "text", "image")


@pytest.mark.parametrize("door", DOORS)
def test_only_named_errors_come_out(doors, door):
    attack(doors[door], QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_only_named_errors_come_out_of_ten_thousand_inputs(doors, door):
    attack(doors[door], SLOW)
