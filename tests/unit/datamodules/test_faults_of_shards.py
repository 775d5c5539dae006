"""Rows of the matrices of faults in whole shards and their index; every test names its row."""

from __future__ import annotations

import pytest
from helpers.faulty_shards import GOOD, batches, conversation_json, plain_image, rank, write_tar

from datamodules import ImageTextShards
from datamodules.index import ARRAYS_FILE, load_index
from datamodules.reader import ShardReader
from datamodules.scan import build_index, index_shard
from datamodules.shards import write_shards
from moextend_pl.contracts import UserError
from moextend_pl.samples.pixels import decode_image

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
        ([*GOOD, ("/etc/x.json", conversation_json())], r"'/etc/x.json'"),
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
