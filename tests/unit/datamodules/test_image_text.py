from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.data_options import grouped

from datamodules import ImageTextShards
from datamodules.dataset import ConversationDataset
from datamodules.mixture import ShardSet
from datamodules.shards import Entry, conversation, is_shard_folder, write_shards
from moextend_pl.contracts import IGNORE_INDEX, UserError


class Ledger(pl.LightningModule):
    """Learns nothing and writes down what it was shown."""

    def __init__(self, spec):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.spec = spec
        self.trained, self.validated, self.tested = [], [], []

    def sample_spec(self):
        return self.spec

    def training_step(self, batch):
        self.trained.append(batch["keys"])
        return self.weight * batch["pixel_values"].sum()

    def validation_step(self, batch):
        self.validated.append(batch)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.tested.append((dataloader_idx, batch))

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return batch["answers"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(tmp_path, steps, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    options = {"val_check_interval": 4, "check_val_every_n_epoch": None, "enable_checkpointing": False, **options}
    return pl.Trainer(max_steps=steps, use_distributed_sampler=False, default_root_dir=tmp_path, **{**quiet, **options})


def data(folder, **options):
    return ImageTextShards(**grouped(**{"train": str(folder), "batch_size": 4, "turns": "single", **options}))


def run(tmp_path, folder, spec, steps, ckpt=None, save_at=None, trainer_options=None, **options):
    module = Ledger(spec)
    callbacks = []
    if save_at:
        callbacks = [
            pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=save_at, save_top_k=-1)
        ]
    fit = trainer(tmp_path, steps, callbacks=callbacks, enable_checkpointing=bool(save_at), **(trainer_options or {}))
    module.data = data(folder, **options)
    fit.fit(module, datamodule=module.data, ckpt_path=ckpt)
    return module


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (0, 2), (2, 0)])
def test_a_resumed_run_sees_exactly_what_an_uninterrupted_one_sees(tmp_path, folder, spec, before, after):
    whole = run(tmp_path, folder, spec, 14, num_workers=0).trained
    cut = run(tmp_path, folder, spec, 9, save_at=6, num_workers=before)
    resumed = run(tmp_path, folder, spec, 14, str(tmp_path / "ckpt/step=6.ckpt"), num_workers=after)
    assert len(whole) == 14
    assert cut.trained == whole[:9]
    assert resumed.trained == whole[6:]
    assert resumed.data.consumed == 14 * 4
    assert resumed.data.epoch == 14 * 4 // 16


def test_a_second_resume_goes_on_too_also_with_validation_between(tmp_path, folder, spec):
    whole = run(tmp_path, folder, spec, 14).trained
    checkpoints = tmp_path / "ckpt"
    run(tmp_path, folder, spec, 4, save_at=3)
    second = run(tmp_path, folder, spec, 9, str(checkpoints / "step=3.ckpt"), save_at=8, val=str(folder))
    third = run(tmp_path, folder, spec, 14, str(checkpoints / "step=8.ckpt"))
    assert second.trained + third.trained[1:] == whole[3:]
    assert third.trained == whole[8:]


def test_accumulation_counts_micro_batches(tmp_path, folder, spec):
    whole = run(tmp_path, folder, spec, 14).trained
    options = {"accumulate_grad_batches": 2}
    run(tmp_path, folder, spec, 4, save_at=3, trainer_options=options)
    resumed = run(tmp_path, folder, spec, 6, str(tmp_path / "ckpt/step=3.ckpt"), trainer_options=options)
    assert resumed.trained == whole[6:12]


def test_a_batch_size_changed_on_resume_repeats_and_skips_nothing(tmp_path, folder, spec):
    whole = [key for batch in run(tmp_path, folder, spec, 14).trained for key in batch]
    run(tmp_path, folder, spec, 4, save_at=3)
    resumed = run(tmp_path, folder, spec, 9, str(tmp_path / "ckpt/step=3.ckpt"), batch_size=6)
    assert [key for batch in resumed.trained for key in batch] == whole[12 : 12 + 6 * 6]


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_limited_length_go_on_where_the_last_one_ended(tmp_path, folder, spec, workers):
    whole = run(tmp_path, folder, spec, 14).trained
    options = {"limit_train_batches": 3, "val_check_interval": None, "check_val_every_n_epoch": 1}
    limited = run(tmp_path, folder, spec, 14, trainer_options=options, val=str(folder), num_workers=workers)
    assert limited.trained == whole


def test_a_new_run_with_the_same_object_starts_at_the_beginning(tmp_path, folder, spec):
    first = run(tmp_path, folder, spec, 3, save_at=2)
    resumed = run(tmp_path, folder, spec, 5, str(tmp_path / "ckpt/step=2.ckpt"), batch_size=2)
    again = Ledger(spec)
    trainer(tmp_path, 6).fit(again, datamodule=resumed.data)
    assert [key for batch in again.trained for key in batch] == [key for batch in first.trained for key in batch]


def test_an_epoch_shows_every_unit_once_and_the_seed_changes_the_order(tmp_path, folder, spec):
    one, other = (
        [key for batch in run(tmp_path, folder, spec, 4, seed=seed).trained for key in batch] for seed in (0, 1)
    )
    expected = sorted(f"s{i:02d}#{turn}" for i in range(11) for turn in range(1 + i % 2))
    assert sorted(one) == sorted(other) == expected
    assert one != other


@pytest.mark.parametrize("change", [{"seed": 1}, {"turns": "together"}])
def test_resuming_with_another_order_is_refused_and_measuring_is_not(tmp_path, folder, spec, change):
    module, checkpoint = run(tmp_path, folder, spec, 3, save_at=3), str(tmp_path / "ckpt/step=3.ckpt")
    with pytest.raises(UserError, match="Cannot resume"):
        run(tmp_path, folder, spec, 5, checkpoint, **change)
    other = data(folder, val=str(folder), **change)
    trainer(tmp_path, 1).validate(module, datamodule=other, ckpt_path=checkpoint, verbose=False)


PLANS = {
    "packing": {"packing": True, "max_length": 40, "batch_size": 2},
    "bucket": {"bucket": 3, "batch_size": 2},
    "mixture": {"weights": (3.0, 1.0)},
}


def two_sets(tmp_path, folder, weights=(None, None)):
    text = tmp_path / "text"
    if not text.exists():
        text.mkdir()
        entries = (Entry(f"t{i}", conversation((f"what is {'a ' * i} circle ?", "yes"))) for i in range(5))
        write_shards(entries, text, samples_per_shard=2)
    return [ShardSet(str(folder), weights[0], "vqa"), ShardSet(str(text), weights[1], "text")]


def flat(batches):
    return [key for batch in batches for key in batch]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_every_plan_of_batches_is_resumed_exactly(tmp_path, folder, spec, name, before, after):
    options = dict(PLANS[name])
    options["train"] = two_sets(tmp_path, folder, options.pop("weights", (None, None)))
    whole = run(tmp_path, folder, spec, 12, **options).trained
    cut = run(tmp_path, folder, spec, 7, save_at=5, num_workers=before, **options)
    resumed = run(tmp_path, folder, spec, 12, str(tmp_path / "ckpt/step=5.ckpt"), num_workers=after, **options)
    assert cut.trained == whole[:7]
    assert resumed.trained == whole[5:]
    assert resumed.data.consumed == len(flat(whole))


def test_packed_batches_show_the_samples_of_the_order_also_after_a_resume_with_other_rows(tmp_path, folder, spec):
    options = {"packing": True, "max_length": 40, "train": two_sets(tmp_path, folder)}
    order = flat(run(tmp_path, folder, spec, 14, train=options["train"]).trained)
    packed = run(tmp_path, folder, spec, 8, save_at=3, batch_size=2, **options).trained
    for batches in range(1, 9):
        shown = flat(packed[:batches])
        assert sorted(shown) == sorted(order[: len(shown)])
    resumed = run(tmp_path, folder, spec, 6, str(tmp_path / "ckpt/step=3.ckpt"), batch_size=4, **options).trained
    shown = flat(packed[:3] + resumed)
    assert sorted(shown) == sorted(order[: len(shown)])


def test_buckets_are_resumed_with_the_same_batches_only(tmp_path, folder, spec):
    run(tmp_path, folder, spec, 3, save_at=3, bucket=2)
    with pytest.raises(UserError, match="`bucket` and `batch_size`"):
        run(tmp_path, folder, spec, 5, str(tmp_path / "ckpt/step=3.ckpt"), bucket=2, batch_size=2)


def test_a_mixture_is_resumed_with_the_same_weights_only(tmp_path, folder, spec):
    run(tmp_path, folder, spec, 3, save_at=3, train=two_sets(tmp_path, folder, (1.0, 2.0)))
    with pytest.raises(UserError, match="Cannot resume"):
        run(tmp_path, folder, spec, 5, str(tmp_path / "ckpt/step=3.ckpt"), train=two_sets(tmp_path, folder, (1.0, 1.0)))


def test_samples_carry_the_task_of_their_set(tmp_path, folder, spec):
    module = ImageTextShards(**grouped(train=two_sets(tmp_path, folder), batch_size=21, turns="single", spec=spec))
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert {key[0] for key in batch["keys"]} == {"s", "t"}
    assert batch["tasks"] == [{"s": "vqa", "t": "text"}[key[0]] for key in batch["keys"]]


def test_lengths_are_counted_once_and_kept_beside_the_shards(tmp_path, folder, spec, monkeypatch):
    def lengths(**options):
        module = data(folder, spec=spec, packing=True, **{"max_length": 40, **options})
        module.setup("fit")
        return module, np.load(next(iter(set(folder.glob("lengths-*.npy")) - known)))

    known = set()
    module, kept = lengths()
    samples = module._training_set()
    assert kept.tolist() == [len(samples[unit].input_ids) for unit in range(len(samples))]
    known = set(folder.glob("lengths-*.npy"))
    _, cut = lengths(max_length=12, turns="together")
    assert cut.max() == 12
    assert is_shard_folder(folder), "the files must not stop a set from being built again"
    monkeypatch.setattr(ConversationDataset, "length", lambda *_: pytest.fail("counted again"))
    known = set()
    lengths()


def test_lengths_of_a_folder_that_cannot_be_written_are_kept_in_the_run_directory(tmp_path, folder, spec, monkeypatch):
    real = np.save

    def refuse(stream, *arguments, **options):
        if str(folder) in stream.name:
            raise PermissionError(13, "read-only")
        real(stream, *arguments, **options)

    monkeypatch.setattr(np, "save", refuse)
    (tmp_path / "run").mkdir()
    run(tmp_path / "run", folder, spec, 2, packing=True, max_length=40)
    assert len(list((tmp_path / "run").glob("lengths-*.npy"))) == 1
    assert not list(folder.glob("*lengths*"))


def test_a_model_that_cannot_take_packed_rows_is_refused(tmp_path, folder, spec):
    leaking = replace(spec, packing_obstacle="jamba has layers (linear_attention) that leak")
    with pytest.raises(UserError, match="jamba has layers.*packing: false"):
        run(tmp_path, folder, leaking, 1, packing=True, max_length=40)


def test_a_damaged_sample_counts_as_short_and_is_reported_when_it_is_due(tmp_path, spec, picture):
    (tmp_path / "s").mkdir()
    entries = [Entry(f"k{i}", conversation(("what ?", "red"))) for i in range(2)]
    write_shards([*entries, Entry("bad", conversation(("what ?", "red")))], tmp_path / "s")
    tar = tmp_path / "s" / "00000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'{"conversations"', b'{"conversaXions"', 1))
    module = ImageTextShards(
        **grouped(train=str(tmp_path / "s"), spec=spec, batch_size=1, packing=True, max_length=20, max_bad_samples=0)
    )
    module.setup("fit")
    with pytest.raises(UserError, match="00000.tar"):
        next(iter(module.train_dataloader()))


def ranked(folder, spec, rank, world, distributed_sampler=False, **options):
    module = data(folder, spec=spec, **options)
    progress = SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0)))
    module.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        fit_loop=SimpleNamespace(epoch_loop=progress),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=distributed_sampler),
    )
    module.setup("fit")
    return module


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_each_global_batch(folder, spec, world):
    alone = iter(ranked(folder, spec, 0, 1).train_dataloader())
    ranks = [iter(ranked(folder, spec, rank, world).train_dataloader()) for rank in range(world)]
    for _ in range(9):
        assert next(alone)["keys"] == [key for rank in ranks for key in next(rank)["keys"]]


def test_what_was_consumed_counts_the_samples_of_all_ranks(folder, spec):
    whole = iter(ranked(folder, spec, 0, 1).train_dataloader())
    batches = [next(whole)["keys"] for _ in range(4)]
    module = ranked(folder, spec, 1, 2)
    assert module.consumed == 0
    module.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 3
    assert module.state_dict()["consumed"] == 12
    assert next(iter(module.train_dataloader()))["keys"] == batches[3][2:]


def test_ranks_validate_each_unit_once_in_as_many_batches(folder, spec):
    loaders = [ranked(folder, spec, rank, 4, val=str(folder), eval_batch_size=12).val_dataloader() for rank in range(4)]
    batches = [list(loader) for loader in loaders]
    assert [len(rank) for rank in batches] == [2, 2, 2, 2]
    keys = [key for rank in batches for batch in rank for key in batch["keys"]]
    assert len([key for key in keys if key]) == len({key for key in keys if key}) == 16
    fillers = [b["labels"][b["keys"].index("")] for rank in batches for b in rank if "" in b["keys"]]
    assert len(fillers) == 2
    assert all(filler.eq(IGNORE_INDEX).all() for filler in fillers)


def test_a_batch_that_ranks_cannot_share_and_a_second_sampler_are_refused(folder, spec):
    with pytest.raises(UserError, match="4 or 8"):
        ranked(folder, spec, 0, 4, batch_size=6)
    with pytest.raises(UserError, match="use_distributed_sampler: false"):
        ranked(folder, spec, 0, 2, distributed_sampler=True)


def test_validation_is_limited_to_a_fixed_draw(folder, spec):
    def keys(**options):
        module = data(folder, val=[str(folder)], spec=spec, **options)
        module.setup("validate")
        return [key for batch in module.val_dataloader() for key in batch["keys"]]

    whole = keys()
    assert whole == [f"s{i:02d}#{turn}" for i in range(11) for turn in range(1 + i % 2)]
    five = keys(val_samples=5)
    assert len(five) == 5
    assert five == keys(val_samples=5) == [key for key in whole if key in five]
    assert set(five) < set(keys(val_samples=9))
    assert five != keys(val_samples=5, seed=1)
    assert keys(val_samples=100) == whole


def test_validation_batches_are_training_like(folder, spec):
    module = data(folder, val=str(folder), spec=spec)
    module.setup("fit")
    batch = next(iter(module.val_dataloader()))
    assert "prompts" not in batch
    assert batch["attention_mask"][:, 0].all()
    assert batch["labels"].ne(IGNORE_INDEX).any(dim=1).all()


def test_tests_and_predictions_are_generation_batches_one_loader_a_set(tmp_path, folder, spec):
    sets = {"first": str(folder), "second": str(folder)}
    module = Ledger(spec)
    shards = ImageTextShards(**grouped(test=sets, predict=sets, batch_size=4, turns="single"))
    assert shards.test_names == shards.predict_names == ["first", "second"]
    trainer(tmp_path, 1).test(module, datamodule=shards, verbose=False)
    assert {number for number, _ in module.tested} == {0, 1}
    answers = [answer for number, batch in module.tested if number == 1 for answer in batch["answers"]]
    assert answers == [answer for i in range(11) for answer in ["blue", "no"][: 1 + i % 2]]
    for _, batch in module.tested:
        assert batch["attention_mask"][:, -1].all()
        assert batch["input_ids"][:, -1].eq(spec.tokenizer.convert_tokens_to_ids("[/INST]")).all()
        assert batch["labels"].eq(IGNORE_INDEX).all()
    predicted = trainer(tmp_path, 1).predict(module, datamodule=shards)
    assert [answer for batch in predicted[1] for answer in batch] == answers


def test_what_is_missing_is_told_at_setup(tmp_path, folder, spec):
    with pytest.raises(UserError, match="under `train`"):
        ImageTextShards(spec=spec).setup("fit")
    for options, stage in (
        ({"train": str(tmp_path / "none")}, "fit"),
        ({"train": str(folder), "val": str(tmp_path / "none")}, "fit"),
        ({"val": str(tmp_path / "none")}, "validate"),
        ({"test": {"x": str(tmp_path / "none")}}, "test"),
        ({"predict": {"x": str(tmp_path / "none")}}, "predict"),
        ({"predict": {"x": str(tmp_path / "none")}}, None),
    ):
        with pytest.raises(UserError, match=r"none.*cwd"):
            ImageTextShards(**grouped(spec=spec, **options)).setup(stage)
    with pytest.raises(UserError, match="sample_spec"):
        ImageTextShards(train=str(folder)).setup("fit")

    class Silent(Ledger):
        sample_spec = None

    with pytest.raises(UserError, match="sample_spec"):
        trainer(tmp_path, 1).fit(Silent(spec), datamodule=ImageTextShards(train=str(folder)))


def test_no_validation_set_means_no_validation(tmp_path, folder, spec):
    assert run(tmp_path, folder, spec, 5).validated == []


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_command_without_a_set_is_refused_where_it_would_write_nothing(tmp_path, folder, spec, command):
    with pytest.raises(UserError, match=f"under `{command}` of the data module, got none"):
        getattr(trainer(tmp_path, 1), command)(Ledger(spec), datamodule=data(folder))
