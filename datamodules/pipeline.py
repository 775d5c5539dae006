"""A pipeline of the user's own, for example of webdataset, as the training set; what is measured comes from shards."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from datamodules.bad_samples import BadSampleBook
from datamodules.batching import BatchPlan
from datamodules.dataset import BatchLoader
from datamodules.image_text import ImageTextShards
from datamodules.mixture import ShardSet
from datamodules.options import EvaluationSpec, ReadingSpec, RowSpec
from datamodules.order import slice_of_rank
from datamodules.pipeline_samples import PipelineSamples
from datamodules.workers import worker_options
from moextend_pl.contracts import Batch, SampleSpec, UserError
from moextend_pl.samples.conversation import ConversationEncoder

log = logging.getLogger(__name__)
NO_EXACT_RESUME = (
    "the training set is a pipeline of your own: the order of its samples is its own affair, so that a run that is "
    "stopped and goes on sees others than one that was not, and no two runs need be the same"
)
BEGINS_ANEW = (
    "the pipeline of the training set begins anew: of the %d samples that the run had seen some come again, others may "
    "never come"
)


class OwnPipeline(ImageTextShards):
    """Trains on what a pipeline of your own yields; validation, tests and predictions come from folders of shards.

    A pipeline is what a function without arguments returns: a `webdataset.WebDataset`, another `IterableDataset` or
    any iterable. It yields samples, decoded or not: `__key__`, `json` with `conversations` or `txt` with a caption, and
    pictures as `jpg`, `png`, `webp` or `0.png`; or `conversations` beside `image` or `images`. It is begun again
    when it is through, a generator by another call of the function. How it shuffles, and that each rank has its own
    samples, is its affair (webdataset: `nodesplitter=webdataset.split_by_node`), and two ranks that begin with the same
    batch are refused; an `IterableDataset` shares its samples between workers by itself, of other iterables each worker
    takes every n-th sample.

    What is lost is exact resume: a run that goes on begins the pipeline anew. Nor is there packing or sorting by
    length.

    Args:
        pipeline: Function that returns the pipeline, by its dotted name; its package needs `--allow-class-path`.
        val: As of ImageTextShards.
        test: As of ImageTextShards.
        predict: As of ImageTextShards.
        batch_size: Rows of a batch over all ranks together.
        rows: `max_length` counts; what needs to know all samples beforehand is refused.
        evaluation: How much is validated, tested and predicted at once.
        reading: How samples are read; `num_workers` and `max_bad_samples` count for the pipeline too.
        spec: What the model asks of its data; asked from the trainer's module if None.

    Example::

        data:
          class_path: datamodules.OwnPipeline
          init_args:
            pipeline: my_package.data.training
            val: data/vqa/val
            batch_size: 16
            reading: {num_workers: 4}
    """

    def __init__(
        self,
        pipeline: Callable[[], Iterable[Any]],
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
        super().__init__(
            val=val,
            test=test,
            predict=predict,
            batch_size=batch_size,
            rows=rows,
            evaluation=evaluation,
            reading=reading,
            spec=spec,
        )
        self.pipeline = pipeline
        for name, value, usual in (("packing", self.rows.packing, False), ("bucket", self.rows.bucket, 1),
                                   ("turns", self.rows.turns, "together")):  # fmt: skip
            if value != usual:
                raise UserError(
                    f"Expected `rows.{name}: {usual}` with a pipeline of your own, whose samples are not known "
                    f"beforehand, got {value}. Leave it out, or make shards (`shards build`)."
                )

    def setup(self, stage: str | None = None) -> None:
        """Opens the folders that a stage needs, and says what a pipeline of one's own costs."""
        super().setup(stage)
        if stage == "fit":
            log.warning(NO_EXACT_RESUME)

    @property
    def epoch(self) -> int:
        """How often the training set was seen as a whole, which nobody knows."""
        return 0

    def train_dataloader(self) -> BatchLoader:
        """Returns the endless loader over the pipeline."""
        share = slice_of_rank(self.batch_size, *self._ranks())
        stream = PipelineSamples(self.pipeline, ConversationEncoder(self.sample_spec(), self.rows.max_length))
        size, workers = share.stop - share.start, self.reading.num_workers
        return PipelineLoader(stream, size, workers, self._book(), self._begin)

    def _begin(self, first: Batch) -> None:
        """Counts samples from here on; once, before the first step, ranks tell each other what they begin with.

        Raises:
            UserError: If two of them begin with the same; on all ranks.
        """
        start = self.consumed  # from its first look on it counts
        log.debug("the pipeline begins behind %d samples", start)
        _, ranks = self._ranks()
        if self.trainer is None or ranks == 1:
            return
        strategy = self.trainer.strategy
        names = strategy.all_gather(torch.tensor([_name_of(first)], device=strategy.root_device))
        if len(set(names.flatten().tolist())) < ranks:
            raise UserError(
                f"Expected a pipeline that gives each of {ranks} ranks samples of its own, got the same first batch on "
                "several. Share them by rank: with webdataset `nodesplitter=webdataset.split_by_node`, else for "
                'example `itertools.islice(samples, int(os.environ["RANK"]), None, int(os.environ["WORLD_SIZE"]))`.'
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns how many samples were consumed."""
        return {"pipeline": True, "consumed": self.consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Says that the pipeline begins anew; counts go on.

        Raises:
            UserError: If the checkpoint was written with shards.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        if not state_dict.get("pipeline"):
            raise UserError(
                "Cannot resume: the checkpoint was written with shards, this run has a pipeline of its own. Resume "
                "with the same data, or start a new run."
            )
        self._start, self._processed_at_start = int(state_dict["consumed"]), None
        log.warning(BEGINS_ANEW, self._start)

    def _training_plan(self) -> BatchPlan:
        return _Counted(self.batch_size)


class _Counted:
    """Knows how many samples a number of batches has, and nothing of their order."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def batch(self, start: int) -> tuple[list[Any], int]:
        raise NotImplementedError

    def after(self, start: int, batches: int) -> int:
        return start + batches * self.batch_size


class PipelineLoader(BatchLoader):
    """Batches of a pipeline; a worker's `UserError` arrives as it is.

    Args:
        stream: The samples.
        batch_size: Samples of a batch of this rank.
        num_workers: Processes that read and encode; 0 does it in this one.
        book: Counts bad samples.
        begin: Told the first batch before it is given away.
    """

    endless = True

    def __init__(
        self,
        stream: PipelineSamples,
        batch_size: int,
        num_workers: int,
        book: BadSampleBook,
        begin: Callable[[Batch], None],
    ) -> None:
        self.book = book
        self.begin = begin
        self.loader = DataLoader(
            stream,
            batch_size=batch_size,
            collate_fn=stream.collate,
            pin_memory=torch.cuda.is_available(),
            **worker_options(num_workers),
        )

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(super().__iter__()):
            if not number:
                self.begin(batch)
            yield batch


def _name_of(batch: Batch) -> int:
    """Names a batch by what it holds, in 56 bits."""
    content = json.dumps([batch["keys"], batch["image_keys"], batch["input_ids"].tolist()])
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=7).digest(), "big")
