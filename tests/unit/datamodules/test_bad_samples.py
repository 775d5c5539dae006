from __future__ import annotations

import json
import multiprocessing
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from helpers.data_options import grouped

from datamodules import ImageTextShards
from datamodules.bad_samples import BAD_SAMPLES_FILE, BadSample, BadSampleBook, placeholder
from datamodules.dataset import BatchLoader, ConversationDataset, UnitTable
from datamodules.order import EveryUnitOnce
from datamodules.shards import Entry, conversation, write_shards
from moextend_pl.contracts import IGNORE_INDEX, UserError
from moextend_pl.samples.conversation import ConversationEncoder


def bad(number):
    return BadSample("x.tar", f"k{number}", f"reason {number}")


def listed(folder):
    return [json.loads(line) for line in (folder / BAD_SAMPLES_FILE).read_text().splitlines()]


def test_each_sample_is_listed_and_counted_once(tmp_path):
    book = BadSampleBook(2, tmp_path)
    for _ in range(3):
        book.note([bad(0), bad(1)])
    assert listed(tmp_path) == [{"shard": "x.tar", "key": f"k{n}", "reason": f"reason {n}"} for n in (0, 1)]
    with pytest.raises(UserError, match=r"at most 2 bad sample.*met 3") as caught:
        book.note([bad(2)])
    assert "x.tar: k0: reason 0\n  x.tar: k1: reason 1\n  x.tar: k2: reason 2" in str(caught.value)
    assert len(listed(tmp_path)) == 3  # the one too many as well


def test_starts_and_ranks_of_a_run_share_the_list(tmp_path):
    one, other = BadSampleBook(3, tmp_path), BadSampleBook(3, tmp_path)
    one.note([bad(0), bad(1)])
    other.note([bad(1), bad(2)])
    assert [line["key"] for line in listed(tmp_path)] == ["k0", "k1", "k2"]
    with pytest.raises(UserError, match="met 4"):
        one.note([bad(3)])
    with (tmp_path / BAD_SAMPLES_FILE).open("a") as stream:
        stream.write('{"shard": "x')  # a process that was killed while it wrote
    with pytest.raises(UserError, match="met 5"):
        BadSampleBook(3, tmp_path).note([bad(4)])


def test_ranks_that_meet_a_bad_sample_at_the_same_moment_do_not_go_over_the_budget_together(tmp_path, monkeypatch):
    one, other = BadSampleBook(1, tmp_path), BadSampleBook(1, tmp_path)
    write = BadSampleBook._write

    def write_while_the_other_has_read(book, sample):
        if book is one:
            other.note([bad(1)])  # it cannot know of the sample that is only now written down
        write(book, sample)

    monkeypatch.setattr(BadSampleBook, "_write", write_while_the_other_has_read)
    with pytest.raises(UserError, match="at most 1 bad sample.*met 2"):
        one.note([bad(0)])


def _note_many(folder, start):
    book = BadSampleBook(10_000, folder)
    for number in range(start, start + 100):
        book.note([bad(number)])


def test_lines_of_processes_do_not_mix(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_note_many, args=(tmp_path, start)) for start in (0, 100, 200)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(line["key"] for line in listed(tmp_path)) == sorted(f"k{n}" for n in range(300))


def test_without_a_folder_the_list_is_kept_in_memory_and_a_long_one_is_cut():
    book = BadSampleBook(30)
    book.note([bad(n) for n in range(30)])
    with pytest.raises(UserError, match="and 11 more") as caught:
        book.note([bad(30)])
    assert str(caught.value).count("reason") == 20
    with pytest.raises(UserError, match="at least 0, got -1"):
        BadSampleBook(-1)


def test_a_placeholder_weighs_nothing(spec, pixels):
    encoder = ConversationEncoder(spec)
    found = placeholder(encoder.filler(), bad(0))
    assert (found.key, found.labels.tolist(), len(found.pixel_values)) == ("k0", [IGNORE_INDEX], 0)
    full = encoder.filler()
    full.labels[:] = 1
    with pytest.raises(ValueError, match="nothing to learn"):
        placeholder(full, bad(0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("turns", ["together", "single"])
def test_every_other_sample_of_a_batch_stays_as_it_is(tmp_path, spec, picture, workers, turns):
    question = conversation(("<image> what ?", "red"), ("is it ?", "no"))
    images = [picture(n) if n not in (1, 4) else picture(n)[:-30] for n in range(6)]
    (tmp_path / "s").mkdir()
    write_shards([Entry(f"k{n}", question, (images[n],)) for n in range(6)], tmp_path / "s", 4)
    table = UnitTable([tmp_path / "s"], turns)
    dataset = ConversationDataset(table, ConversationEncoder(spec))
    book = BadSampleBook(2, tmp_path / "run")
    batches = list(BatchLoader(dataset, EveryUnitOnce(range(len(table)), 4, 0, 1), workers, book))
    keys = [key.partition("#")[0] for batch in batches for key in batch["keys"]]
    assert keys == [f"k{unit * 6 // len(table)}" for unit in range(len(table))]
    for batch in batches:
        learned = batch["labels"].ne(IGNORE_INDEX).any(dim=1).tolist()
        assert learned == [key.partition("#")[0] not in ("k1", "k4") for key in batch["keys"]]
        assert len(batch["pixel_values"]) == len(batch["image_keys"]) == sum(learned)
    found = listed(tmp_path / "run")
    assert [(line["key"], line["shard"].rpartition("/")[2]) for line in found] == [
        ("k1", "00000.tar"),
        ("k4", "00001.tar"),
    ]
    assert all(line["reason"].startswith("the image is cut short or damaged") for line in found)
    strict = BatchLoader(dataset, EveryUnitOnce(range(len(table)), 4, 0, 1), workers, BadSampleBook(1, tmp_path / "r"))
    with pytest.raises(UserError, match=r"(?s)at most 1 bad.*00000.tar: k1: .*00001.tar: k4: "):
        list(strict)


class Counting(pl.LightningModule):
    """Counts what it is given."""

    def __init__(self, spec):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.spec = spec
        self.seen = []

    def sample_spec(self):
        return self.spec

    def training_step(self, batch):
        self.seen += batch["keys"]
        return self.weight * batch["pixel_values"].sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_lists_bad_samples_in_its_directory_and_stops_beyond_the_budget(tmp_path, spec, picture, workers):
    question = conversation(("<image> what ?", "red"))
    images = [picture(n) if n % 2 else picture(n)[:-30] for n in range(8)]
    (tmp_path / "s").mkdir()
    write_shards([Entry(f"k{n}", question, (images[n],)) for n in range(8)], tmp_path / "s", 4)

    def fit(run, budget):
        module = Counting(spec)
        trainer = pl.Trainer(
            max_steps=6,  # three epochs
            default_root_dir=run,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        data = ImageTextShards(
            **grouped(train=str(tmp_path / "s"), batch_size=4, num_workers=workers, max_bad_samples=budget)
        )
        trainer.fit(module, datamodule=data)
        return module

    assert sorted(fit(tmp_path / "run", 4).seen) == sorted([f"k{n}" for n in range(8)] * 3)
    assert sorted(line["key"] for line in listed(tmp_path / "run")) == ["k0", "k2", "k4", "k6"]
    fit(tmp_path / "run", 4)  # started again: the same four
    assert len(listed(tmp_path / "run")) == 4
    with pytest.raises(UserError, match="at most 3 bad sample"):
        fit(tmp_path / "other", 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_in_a_packed_row_takes_none_of_the_others_with_it(tmp_path, spec, picture, workers):
    (tmp_path / "s").mkdir()
    question = conversation(("<image> what ?", "red"))
    images = [picture(n) if n not in (1, 4) else picture(n)[:-30] for n in range(6)]
    write_shards([Entry(f"k{n}", question, (images[n],)) for n in range(6)], tmp_path / "s")
    module = ImageTextShards(
        **grouped(train=str(tmp_path / "s"), spec=spec, batch_size=2, packing=True, max_length=36, num_workers=workers)
    )
    module.trainer = SimpleNamespace(
        global_rank=0,
        world_size=1,
        default_root_dir=str(tmp_path / "run"),
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0)))
        ),
    )
    module.setup("fit")
    batches = iter(module.train_dataloader())
    for _ in range(4):  # an epoch and more
        batch = next(batches)
        learned = int(batch["labels"].ne(IGNORE_INDEX).sum())
        assert learned == 2 * len(batch["pixel_values"]) > 0  # `red </s>` of each whole sample
    assert {line["key"] for line in listed(tmp_path / "run")} == {"k1", "k4"}
