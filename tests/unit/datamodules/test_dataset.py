from __future__ import annotations

import os
import pickle
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodules.bad_samples import bad_samples_of
from datamodules.dataset import BatchLoader, ConversationDataset, UnitTable
from datamodules.index import save_index
from datamodules.kept import Kept
from datamodules.order import FILLER, EveryUnitOnce, Order
from datamodules.shards import Entry, conversation, write_shards
from datamodules.workers import WORKER_PATIENCE, begin_worker
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


def test_an_index_that_promises_more_turns_makes_a_bad_sample_of_each_missing_one(tmp_path, spec):
    shards = write_shards([Entry("a", conversation(("what ?", "red")))], tmp_path)
    save_index(tmp_path, [replace(shards[0], turns=np.array([2], np.int32))])
    samples = dataset(tmp_path, spec, "single")
    assert samples[0].key == "a#0"
    assert "the index says that it has turn 1, got 1 turn(s)" in bad_samples_of([samples[1]])[0].reason


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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "not enough memory for a batch. Lower `batch_size` or `num_workers`"),
        (OSError(5, "Input/output error", "00001.tar"), "cannot be read 00001.tar: Input/output error"),
        (PermissionError(13, "Permission denied", "00001.tar"), "cannot be read 00001.tar: Permission denied"),
    ],
)
def test_what_the_system_refuses_a_worker_is_one_sentence(folder, spec, monkeypatch, workers, error, message):
    samples = dataset(folder, spec)
    monkeypatch.setattr(samples, "read", lambda _: (_ for _ in ()).throw(error))
    batches = EveryUnitOnce(np.arange(len(samples)), 4, 0, 1)
    with pytest.raises(UserError, match=message):
        next(iter(BatchLoader(samples, batches, workers)))


def test_a_worker_told_to_end_goes_on_for_a_while(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    alarms, threads = [], torch.get_num_threads()
    monkeypatch.setattr(signal, "alarm", alarms.append)
    try:
        begin_worker(0)
        for number in before:
            os.kill(os.getpid(), number)
    finally:
        torch.set_num_threads(threads)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert alarms == [60]


def test_workers_change_no_batch(folder, spec):
    units = Order([4, 4, 3], 0).epoch(0)
    plain, forked = (
        list(BatchLoader(dataset(folder, spec), EveryUnitOnce(units, 4, 0, 1), workers)) for workers in (0, 2)
    )
    assert [batch["keys"] for batch in plain] == [batch["keys"] for batch in forked]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(plain, forked, strict=True))
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(plain, forked, strict=True))


def test_workers_start_again_and_again_beside_busy_threads(folder, spec):
    """A fork takes no threads along: pools that were used before it must not be waited for in a worker."""
    torch.set_num_threads(2)
    try:
        weights = torch.randn(256, 256, requires_grad=True)
        expected = [batch["keys"] for batch in BatchLoader(dataset(folder, spec), EveryUnitOnce(range(4), 2, 0, 1), 0)]
        for _ in range(8):
            (weights @ weights).sum().backward()
            spec.tokenizer(["what is the color ?"] * 2000)
            loader = BatchLoader(dataset(folder, spec), EveryUnitOnce(range(4), 2, 0, 1), 1)
            loader.loader.timeout = 30
            assert [batch["keys"] for batch in loader] == expected
    finally:
        torch.set_num_threads(1)


def test_a_worker_that_stands_still_is_an_error(folder, spec, monkeypatch):
    samples = dataset(folder, spec)
    monkeypatch.setattr(samples, "collate", lambda _samples: time.sleep(60))
    loader = BatchLoader(samples, EveryUnitOnce(range(4), 2, 0, 1), 1)
    assert loader.loader.timeout == WORKER_PATIENCE
    loader.loader.timeout = 1
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        next(iter(loader))


def test_a_dataset_can_be_sent_to_a_process_that_was_not_forked(folder, spec):
    samples = dataset(folder, spec, "single")
    sent = pickle.loads(pickle.dumps(samples))
    assert [sent[unit].key for unit in range(16)] == [samples[unit].key for unit in range(16)]
    assert torch.equal(sent[5].input_ids, samples[5].input_ids)


def test_a_filler_gives_an_empty_sample(folder, spec):
    for generation in (False, True):
        sample = dataset(folder, spec, generation=generation)[FILLER]
        assert sample.key == ""
        assert set(sample.labels.tolist()) == {IGNORE_INDEX}


def test_what_is_kept_equals_what_is_read_anew_and_is_neither_read_nor_decoded_again(folder, spec, monkeypatch):
    anew, kept = dataset(folder, spec, "single"), dataset(folder, spec, "single", keep=2**20)
    for unit in range(len(anew)):
        assert kept[unit].key == anew[unit].key
    monkeypatch.setattr("datamodules.dataset.decode_image", None)
    monkeypatch.setattr("datamodules.reader.ShardReader.read", None)
    again = [kept[unit] for unit in range(len(anew))]
    monkeypatch.undo()
    for unit, sample in enumerate(again):
        sample.pixel_values.add_(1.0)  # what is done to a sample does not reach what is kept
        expected, got = anew[unit], kept[unit]
        assert torch.equal(got.input_ids, expected.input_ids)
        assert torch.equal(got.pixel_values, expected.pixel_values)
        assert got.image_keys == expected.image_keys


def test_no_more_is_kept_than_the_limit_and_a_copy_for_a_worker_begins_empty():
    calls = []

    def value(size):
        return lambda: calls.append(size) or b"x" * size

    kept = Kept(10, len)
    for key, size in (("a", 6), ("b", 5), ("c", 4), ("a", 6), ("b", 5), ("c", 4)):
        assert kept.get(key, value(size)) == b"x" * size
    assert calls == [6, 5, 4, 5]
    copy = pickle.loads(pickle.dumps(kept))
    assert (copy.limit, copy.used) == (10, 0)
    copy.get("a", value(6))
    assert calls == [6, 5, 4, 5, 6]


def test_a_sample_that_cannot_be_read_is_not_kept(folder, spec, monkeypatch):
    samples = dataset(folder, spec, keep=2**20)
    with monkeypatch.context() as patch:
        patch.setattr(
            "datamodules.reader.ShardReader.read", lambda reader, number: (_ for _ in ()).throw(UserError("x"))
        )
        assert bad_samples_of([samples[0]])
    assert not bad_samples_of([samples[0]])
