"""`ImageTextShards`: shard folders in, training, validation and generation batches out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np

from datamodules.bad_samples import BadSampleBook
from datamodules.batching import BatchPlan, BucketBatches, EndlessBatches, PackedBatches, PlainBatches, check_options
from datamodules.dataset import BatchLoader, ConversationDataset, UnitTable
from datamodules.kept import MIB
from datamodules.lengths import unit_lengths
from datamodules.mixture import Sets, ShardSet, shard_sets, training_order
from datamodules.options import EvaluationSpec, ReadingSpec, RowSpec
from datamodules.order import EveryUnitOnce, shuffled, slice_of_rank
from moextend_pl.contracts import SampleSpec, UserError, run_directory
from moextend_pl.samples.conversation import ConversationEncoder

STATE_SCHEMA = 1


class ImageTextShards(pl.LightningDataModule):
    """Conversations about images, or without any, from folders of shards.

    Training never ends: give the trainer `max_steps`, `use_distributed_sampler=False`, and validate with
    an integer `val_check_interval` and `check_val_every_n_epoch=None`. What was consumed is kept in the
    checkpoint, so that a run resumed with `ckpt_path` goes on at exactly the next global batch, with any
    number of workers and any number of ranks that divides the batch.

    Args:
        train: Folder or folders to train on, or sets `{path, weight, task}`. Without weights every sample is seen
            once an epoch; with weights the sets are mixed by them, see `datamodules.mixture.Mixture`.
        val: Folder or folders to validate on; weights do not count.
        test: Name -> folder; each gets a generation loader of its own, in the order of `test_names`.
        predict: As `test`, for `trainer.predict`; names in `predict_names`.
        batch_size: Rows of a batch over all ranks together.
        rows: What a row holds, and in which order.
        evaluation: How much is validated, tested and predicted at once.
        reading: How samples are read.
        spec: What the model asks of its data; asked from the trainer's module if None.

    Example::

        data:
          class_path: datamodules.ImageTextShards
          init_args:
            train:
              - {path: data/vqa/train, weight: 0.9, task: vqa}
              - {path: data/text, weight: 0.1}
            test: {vqa: data/vqa/test}
            batch_size: 16
            rows: {max_length: 2048, packing: true}
    """

    def __init__(
        self,
        train: str | ShardSet | list[str | ShardSet] | None = None,
        val: str | ShardSet | list[str | ShardSet] | None = None,
        test: dict[str, str | ShardSet] | None = None,
        predict: dict[str, str | ShardSet] | None = None,
        *,
        batch_size: int = 64,
        rows: RowSpec | None = None,
        evaluation: EvaluationSpec | None = None,
        reading: ReadingSpec | None = None,
        spec: SampleSpec | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.test, self.predict = test or {}, predict or {}
        self.rows, self.reading = rows or RowSpec(), reading or ReadingSpec()
        self.evaluation = evaluation or EvaluationSpec()
        self.batch_size, asked = batch_size, self.evaluation.batch_size
        self.eval_batch_size = batch_size if asked is None else asked
        self.spec = spec
        check_options(self.rows, self.reading, self.evaluation)
        self._tables: dict[tuple[ShardSet, ...], UnitTable] = {}
        self._plan: BatchPlan | None = None
        self._start = 0
        self._processed_at_start: int | None = None
        self._predicted: dict[str, int] = {}

    @property
    def test_names(self) -> list[str]:
        """Names of the test loaders, in order."""
        return list(self.test)

    @property
    def predict_names(self) -> list[str]:
        """Names of the predict loaders, in order."""
        return list(self.predict)

    def prepare_data(self) -> None:
        """Counts the tokens of the training samples if their number is needed: on one rank, while the others wait."""
        if self.train and self._needs_lengths and self.trainer and self.trainer.state.fn == "fit":
            self._training_plan()

    def setup(self, stage: str | None = None) -> None:
        """Opens and checks the folders that a stage needs.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; None for all that are given.

        Raises:
            UserError: If a folder is missing or no valid shard set, a batch size cannot be shared, or samples
                cannot be packed.
        """
        self.sample_spec()
        slice_of_rank(self.batch_size, *self._ranks())
        slice_of_rank(self.eval_batch_size, *self._ranks())
        self._check_trainer()
        if stage == "fit":
            self._start, self._processed_at_start = 0, None
            self._plan = self._training_plan()
        wanted: dict[str, list[Sets]] = {"test": list(self.test.values()), "predict": list(self.predict.values())}
        every: list[list[Sets]] = [[self.val], *wanted.values()]
        groups = every if stage is None else [wanted.get(stage, [self.val])]
        for folders in (folders for group in groups for folders in group if folders):
            self._table(folders, stage or "data")

    def sample_spec(self) -> SampleSpec:
        """Returns what the model asks of its data.

        Raises:
            UserError: If no spec was given and there is no module to ask.
        """
        if self.spec is not None:
            return self.spec
        module = getattr(self.trainer, "lightning_module", None)
        if not callable(getattr(module, "sample_spec", None)):
            raise UserError(
                f"Expected a module with `sample_spec()`, got {type(module).__name__}. Give `spec` to the data module."
            )
        spec: SampleSpec = module.sample_spec()  # type: ignore[union-attr]
        return spec

    @property
    def consumed(self) -> int:
        """Training samples consumed over all ranks and restarts: the whole state of the data."""
        processed = self._processed_batches()
        if self._processed_at_start is None:
            self._processed_at_start = processed
        batches = processed - self._processed_at_start
        return self._plan.after(self._start, batches) if self._plan else self._start

    @property
    def epoch(self) -> int:
        """How often the training set was seen as a whole."""
        return self.consumed // len(self._table(self.train, "train"))

    def train_dataloader(self) -> BatchLoader:
        """Returns the endless loader; every iteration over it starts at the first sample not yet consumed."""
        self._plan = self._plan or self._training_plan()
        batches = EndlessBatches(self._plan, *self._ranks(), consumed=lambda: self.consumed)
        return BatchLoader(self._training_set(), batches, self.reading.num_workers, self._book())

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Returns a loader of training-like batches, once over the validation set; none if there is none."""
        if not self.val:
            return []
        table = self._table(self.val, "val")
        units = np.arange(len(table))
        if self.evaluation.samples is not None:
            units = np.sort(shuffled(len(table), self.rows.seed)[: self.evaluation.samples])
        return self._once(table, units, generation=False)

    def test_dataloader(self) -> list[BatchLoader]:
        """Returns one loader of generation batches for each test set."""
        return self._generations(self.test, "test")

    def predict_dataloader(self) -> list[BatchLoader]:
        """Returns one loader of generation batches for each predict set."""
        return self._generations(self.predict, "predict")

    def go_on_from(self, name: str, batches: int) -> int:
        """Leaves the first batches of a predict set out, which an earlier run has answered.

        Args:
            name: Of the set.
            batches: How many; the last batch stays in any case.

        Returns:
            How many are left out.
        """
        total = -(-len(self._table(self.predict[name], "predict")) // self.eval_batch_size)
        self._predicted[name] = max(min(batches, total - 1), 0)
        return self._predicted[name]

    def predict_facts(self, name: str) -> dict[str, Any]:
        """Returns what decides which answer of a predict set stands where."""
        table, (_, ranks) = self._table(self.predict[name], "predict"), self._ranks()
        batches = {"batch_size": self.eval_batch_size, "ranks": ranks, "max_length": self.rows.max_length}
        return {"shards": table.fingerprint(), "tasks": list(table.tasks), **batches}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint has to keep; it holds for every rank and any number of workers."""
        if not self.train:
            return {}
        weights = [one.weight for one in shard_sets(self.train)]
        data = self._table(self.train, "train").fingerprint() + (f" mixed {weights}" if any(weights) else "")
        state = {"schema": STATE_SCHEMA, "consumed": self.consumed, "seed": self.rows.seed, "data": data}
        # A window of buckets can be taken up at the border of a batch only; other plans go on at any sample.
        return {**state, "bucket": [self.rows.bucket, self.batch_size]} if self.rows.bucket > 1 else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where a checkpoint stopped.

        Raises:
            UserError: If the checkpoint was written with other data, turns, weights or buckets, or another seed.
        """
        # A test with a checkpoint of other training data is no mistake, nor need that data be there.
        if not self.train or not state_dict or (self.trainer is not None and self.trainer.state.fn != "fit"):
            return
        now = self.state_dict()
        names = {"schema": "format of the data state", "seed": "`seed`", "data": "training shards"}
        for name, what in {**names, "bucket": "`bucket` and `batch_size`"}.items():
            if state_dict.get(name) != now.get(name):
                raise UserError(
                    f"Cannot resume: the checkpoint was written with {what} {state_dict.get(name)!r}, this run has "
                    f"{now.get(name)!r}. Resume with the same data, `turns` and `seed`, or start a new run."
                )
        self._start, self._processed_at_start = int(state_dict["consumed"]), None

    def _table(self, sets: Sets, name: str) -> UnitTable:
        found = shard_sets(sets)
        if not found:
            raise UserError(f"Expected a folder of shards under `{name}` of the data module, got none. Set it.")
        if found not in self._tables:
            folders, tasks = [one.path for one in found], [one.task for one in found]
            self._tables[found] = UnitTable(folders, self.rows.turns, tasks, self.reading.streaming)
        return self._tables[found]

    def _dataset(self, table: UnitTable, *, generation: bool = False, packed: bool = False) -> ConversationDataset:
        encoder = ConversationEncoder(self.sample_spec(), self.rows.max_length)
        return ConversationDataset(table, encoder, generation, packed, self.reading.keep_mib * MIB)

    def _training_set(self) -> ConversationDataset:
        return self._dataset(self._table(self.train, "train"), packed=self.rows.packing)

    def _training_plan(self) -> BatchPlan:
        obstacle = self.sample_spec().packing_obstacle
        if self.rows.packing and obstacle:
            raise UserError(f"Expected a model whose samples can be packed, but {obstacle}. Set `packing: false`.")
        sizes = self._table(self.train, "train").sizes_by_folder()
        order = training_order(shard_sets(self.train), sizes, self.rows.seed)
        if not self._needs_lengths:
            return PlainBatches(order, self.batch_size)
        run = run_directory(self.trainer) if self.trainer else None
        lengths = unit_lengths(self._training_set(), run, self.reading.num_workers)
        if self.rows.packing and self.rows.max_length is not None:
            return PackedBatches(order, lengths, self.batch_size, self.rows.max_length)
        return BucketBatches(order, lengths, self.batch_size, self.rows.bucket)

    @property
    def _needs_lengths(self) -> bool:
        return self.rows.packing or self.rows.bucket > 1

    def _generations(self, sets: dict[str, str | ShardSet], name: str) -> list[BatchLoader]:
        if not sets:
            raise UserError(f"Expected named folders of shards under `{name}` of the data module, got none. Set them.")
        loaders = []
        for key, folder in sets.items():
            table, begun = self._table(folder, name), self._predicted.get(key, 0) if name == "predict" else 0
            loaders.append(self._once(table, np.arange(begun * self.eval_batch_size, len(table)), generation=True))
        return loaders

    def _once(self, table: UnitTable, units: np.ndarray, generation: bool) -> BatchLoader:
        batches = EveryUnitOnce(units, self.eval_batch_size, *self._ranks())
        book = None if generation else self._book()
        return BatchLoader(self._dataset(table, generation=generation), batches, self.reading.num_workers, book)

    def _book(self) -> BadSampleBook:
        folder = getattr(self.trainer, "default_root_dir", None)
        return BadSampleBook(self.reading.max_bad_samples, Path(folder) if folder else None)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _processed_batches(self) -> int:
        # Not a counter of our own: this one counts a batch when its step is done, prefetched ones never.
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(progress.processed)

    def _check_trainer(self) -> None:
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if self._ranks()[1] > 1 and getattr(connector, "use_distributed_sampler", False):
            raise UserError(
                "Expected `use_distributed_sampler: false` in the trainer, got true: the data module shares batches "
                "between ranks itself."
            )
