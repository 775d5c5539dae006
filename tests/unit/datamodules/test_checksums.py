"""No bit of a sample changes unseen between the day it was indexed and the step that learns from it."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from helpers.faulty_shards import bad_lines, batches, rank
from safetensors.numpy import load_file, save_file

from datamodules.index import ARRAYS_FILE, INDEX_FILE, file_sha256, load_index
from datamodules.reader import ShardReader
from moextend_pl.contracts import UserError


def samples(reader):
    """Returns every sample, None where it is refused."""
    found = []
    for number in range(len(reader)):
        try:
            found.append(reader.read(number))
        except UserError:
            found.append(None)
    return found


def test_no_flipped_bit_gives_another_sample(folder):
    path = folder / "00000.tar"
    whole = path.read_bytes()
    reader = ShardReader(folder)
    before = samples(reader)
    assert None not in before
    noticed = 0
    with path.open("r+b", buffering=0) as stream:
        for place in np.random.default_rng(0).choice(8 * len(whole), 400, replace=False).tolist():
            byte = whole[place // 8]
            stream.seek(place // 8)
            stream.write(bytes([byte ^ (1 << place % 8)]))
            after = samples(reader)
            assert all(found in (sample, None) for found, sample in zip(after, before, strict=True))
            noticed += None in after
            stream.seek(place // 8)
            stream.write(bytes([byte]))
    assert noticed > 50  # the rest is padding, which no sample holds
    assert samples(reader) == before


def flip(path, text):
    """Changes one letter of a text inside a shard."""
    data = path.read_bytes()
    assert data.count(text) >= 1
    path.write_bytes(data.replace(text, text[:-1] + bytes([text[-1] ^ 1]), 1))


def test_a_changed_letter_is_a_bad_sample_of_a_run(folder, spec, tmp_path):
    flip(folder / "00000.tar", b"blue")
    with pytest.raises(UserError, match=r"00000.tar: s00: .*crc32.*Copy it again"):
        ShardReader(folder).read(0)
    module = rank(folder, spec, 0, 1, tmp_path / "run", batch_size=11)
    module.on_before_batch_transfer(batches(module, 1)[0], 0)
    assert [line["key"] for line in bad_lines(tmp_path / "run")] == ["s00"]


def test_the_index_holds_the_crc32_of_what_a_sample_gives(folder):
    reader = ShardReader(folder)
    for shard in reader.shards:
        for position in range(len(shard)):
            data = (folder / shard.name).read_bytes()
            contents = [data[member.offset : member.offset + member.size] for member in shard.sample(position)]
            assert shard.checksums[position] == zlib.crc32(b"".join(contents))


def older(folder):
    """Takes the checksums out of an index, as the version before wrote it."""
    arrays = load_file(folder / ARRAYS_FILE)
    del arrays["checksums"]
    digest, size = file_sha256(folder / ARRAYS_FILE), (folder / ARRAYS_FILE).stat().st_size
    save_file(arrays, folder / ARRAYS_FILE)
    text = (folder / INDEX_FILE).read_text().replace(digest, file_sha256(folder / ARRAYS_FILE))
    now = (folder / ARRAYS_FILE).stat().st_size
    (folder / INDEX_FILE).write_text(text.replace(f'"bytes": {size},\n  "sha256"', f'"bytes": {now},\n  "sha256"'))


def test_an_older_index_still_loads(folder):
    before = samples(ShardReader(folder))
    older(folder)
    assert load_index(folder)[0].checksums is None
    assert samples(ShardReader(folder)) == before
    from datamodules.command import main

    assert main(["check", str(folder), "--workers", "2"]) == 0


def test_checksums_of_another_number_are_refused(folder):
    arrays = load_file(folder / ARRAYS_FILE)
    older(folder)
    digest, size = file_sha256(folder / ARRAYS_FILE), (folder / ARRAYS_FILE).stat().st_size
    save_file({**arrays, "checksums": arrays["checksums"][:-1]}, folder / ARRAYS_FILE)
    text = (folder / INDEX_FILE).read_text().replace(digest, file_sha256(folder / ARRAYS_FILE))
    now = (folder / ARRAYS_FILE).stat().st_size
    (folder / INDEX_FILE).write_text(text.replace(f'"bytes": {size},\n  "sha256"', f'"bytes": {now},\n  "sha256"'))
    with pytest.raises(UserError, match="checksums does not fit 11 samples"):
        load_index(folder)
