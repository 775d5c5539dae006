from __future__ import annotations

import pytest
import torch

from datamodules.dataset import BatchLoader, ConversationDataset, UnitTable
from datamodules.order import FILLER, EveryUnitOnce, Order
from datamodules.shards import Entry, conversation, write_shards
from moextend_pl.contracts import IGNORE_INDEX, UserError
from moextend_pl.samples.conversation import ConversationEncoder


def dataset(folder, spec, turns="together", **options):
    folders = folder if isinstance(folder, list) else [folder]
    return ConversationDataset(UnitTable(folders, turns), ConversationEncoder(spec), **options)


def test_together_makes_one_unit_of_each_sample(folder, spec):
    samples = dataset(folder, spec)
    assert [samples[i].key for i in range(len(samples))] == [f"s{i:02d}" for i in range(11)]
    assert [len(samples[i].pixel_values) for i in range(11)] == [i % 3 for i in range(11)]


def test_single_makes_one_unit_of_each_turn_and_gives_each_the_images(folder, spec, words):
    samples = dataset(folder, spec, "single")
    expected = [(f"s{i:02d}#{turn}", i % 3) for i in range(11) for turn in range(1 + i % 2)]
    found = [samples[i] for i in range(len(samples))]
    assert [(sample.key, len(sample.pixel_values)) for sample in found] == expected
    for sample in found:
        assert sample.input_ids.eq(len(words)).sum() == 4 * len(sample.pixel_values)
        learned = words.decode(sample.labels[sample.labels != IGNORE_INDEX])
        assert learned == ("blue </s>" if sample.key.endswith("#0") else "no </s>")


def test_single_turns_with_marks_of_their_own_get_their_own_images(tmp_path, spec, picture):
    turns = conversation(("<image> what ?", "red"), ("<image> what ?", "blue"), ("what ?", "no"))
    write_shards([Entry("a", turns, (picture(1), picture(2)))], tmp_path)
    samples = dataset(tmp_path, spec, "single")
    first, second, third = (samples[i] for i in range(3))
    assert torch.equal(torch.cat([first.pixel_values, second.pixel_values]), third.pixel_values)
    assert third.image_keys == first.image_keys + second.image_keys
    assert not torch.equal(first.pixel_values, second.pixel_values)


def test_sizes_of_shards_count_units(folder):
    assert UnitTable([folder]).sizes == [4, 4, 3]
    assert UnitTable([folder], "single").sizes == [6, 6, 4]
    assert UnitTable([folder, folder], "single").sizes == [6, 6, 4, 6, 6, 4]


def test_folders_follow_each_other(folder, tmp_path, spec):
    (tmp_path / "other").mkdir()
    write_shards([Entry("z", conversation(("what ?", "red")))], tmp_path / "other")
    samples = dataset([tmp_path / "other", folder], spec)
    assert [samples[i].key for i in (0, 1, 11)] == ["z", "s00", "s10"]
    assert len(samples) == 12


def test_equal_pictures_have_equal_names_and_others_differ(tmp_path, spec, picture):
    turns = conversation(("<image> what ?", "red"))
    entries = [Entry(key, turns, (picture(colour),)) for key, colour in (("a", 1), ("b", 2), ("c", 1))]
    write_shards(entries, tmp_path)
    samples = dataset(tmp_path, spec)
    (first,), (second,), (third,) = (samples[i].image_keys for i in range(3))
    assert first == third != second


def test_the_fingerprint_tells_other_data_and_other_units(folder, tmp_path):
    (tmp_path / "other").mkdir()
    write_shards([Entry("z", conversation(("what ?", "red")))], tmp_path / "other")
    tables = [UnitTable([folder]), UnitTable([folder], "single"), UnitTable([tmp_path / "other"])]
    assert len({table.fingerprint() for table in tables}) == 3
    assert UnitTable([folder]).fingerprint() == tables[0].fingerprint()


def test_an_unknown_way_of_turns_is_refused(folder):
    with pytest.raises(UserError, match=r"\['together', 'single'\], got 'both'"):
        UnitTable([folder], "both")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_a_sample_reaches_the_user_as_one_sentence(tmp_path, spec, picture, workers):
    (tmp_path / "s").mkdir()
    write_shards([Entry("bad", conversation(("<image> what ?", "red")), (picture(1)[:-30],))], tmp_path / "s")
    loader = BatchLoader(dataset(tmp_path / "s", spec), EveryUnitOnce([0], 1, 0, 1), workers)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert "00000.tar: bad" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "worker" not in str(caught.value)


def test_workers_change_no_batch(folder, spec):
    units = Order([4, 4, 3], 0).epoch(0)
    plain, forked = (
        list(BatchLoader(dataset(folder, spec), EveryUnitOnce(units, 4, 0, 1), workers)) for workers in (0, 2)
    )
    assert [batch["keys"] for batch in plain] == [batch["keys"] for batch in forked]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(plain, forked, strict=True))
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(plain, forked, strict=True))


def test_a_filler_gives_an_empty_sample(folder, spec):
    for generation in (False, True):
        sample = dataset(folder, spec, generation=generation)[FILLER]
        assert sample.key == ""
        assert set(sample.labels.tolist()) == {IGNORE_INDEX}
