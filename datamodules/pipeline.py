"""A pipeline of the user's own, for example of webdataset, as the training set; what is measured comes from shards."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.bad_samples import BadSample, BadSampleBook, bad_samples_of, placeholder
from datamodules.batching import BatchPlan
from datamodules.dataset import BatchLoader, Delivery, Failure
from datamodules.foreign import conversations_of
from datamodules.image_text import ImageTextShards
from datamodules.members import Member, image_order, is_text, is_used
from datamodules.mixture import ShardSet
from datamodules.options import EvaluationSpec, ReadingSpec, RowSpec
from datamodules.order import slice_of_rank
from datamodules.workers import worker_options
from moextend_pl.contracts import Batch, Sample, SampleSpec, UserError
from moextend_pl.samples.collate import collate_training
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import PixelTransform, decode_image, to_rgb
from moextend_pl.samples.turns import parse_turns

log = logging.getLogger(__name__)
CONVERSATIONS, KEY, PLACE = "conversations", "__key__", "__url__"
PICTURES = ("image", "images")
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
    when it is through. How it shuffles, and that each rank has its own samples, is its affair (webdataset:
    `nodesplitter=webdataset.split_by_node`); an `IterableDataset` shares its samples between workers by itself, of
    other iterables each worker takes every n-th sample.

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
        stream = PipelineSamples(self.pipeline(), ConversationEncoder(self.sample_spec(), self.rows.max_length))
        size, workers = share.stop - share.start, self.reading.num_workers
        return PipelineLoader(stream, size, workers, self._book(), begin=lambda: self.consumed)

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


class PipelineSamples(IterableDataset[Any]):
    """Encodes what a pipeline yields, without end.

    Args:
        pipeline: Yields samples.
        encoder: Conversation -> ids and labels.
    """

    def __init__(self, pipeline: Iterable[Any], encoder: ConversationEncoder) -> None:
        self.pipeline = pipeline
        self.encoder = encoder
        self.transform = PixelTransform(encoder.spec)

    def __iter__(self) -> Iterator[Sample | Failure]:
        for round_ in itertools.count():
            sample = None
            for number, sample in enumerate(self._own()):
                yield self._encoded(sample, f"{round_}-{number}")
            if sample is None:
                yield Failure("The pipeline of the training set yields no sample. Look at the function that makes it.")
                return

    def _own(self) -> Iterable[Any]:
        """Returns the samples of this worker."""
        worker = get_worker_info()
        if worker is None or isinstance(self.pipeline, IterableDataset):
            return self.pipeline
        return itertools.islice(self.pipeline, worker.id, None, worker.num_workers)

    def _encoded(self, sample: Any, number: str) -> Sample | Failure:
        if not isinstance(sample, Mapping):
            return Failure(
                f"Expected samples as mappings from the pipeline of the training set, got {type(sample).__name__}. "
                "Leave out `to_tuple` and `batched`."
            )
        place, key = str(sample.get(PLACE, "pipeline")), str(sample.get(KEY, number))
        try:
            return self._encode(sample, key, f"{place}: {key}")
        except UserError as error:
            reason = str(error).removeprefix(f"{place}: {key}: ")
            return placeholder(self.encoder.filler(), BadSample(place, key, reason))

    def _encode(self, sample: Mapping[str, Any], key: str, origin: str) -> Sample:
        pictures = pictures_of(sample)
        images = [decode_image(p, origin) if isinstance(p, bytes) else to_rgb(p) for p in pictures]
        contents = [p if isinstance(p, bytes) else p.tobytes() for p in pictures]
        names = [hashlib.blake2b(content, digest_size=8).hexdigest() for content in contents]
        turns = parse_turns(conversations_of(texts_of(sample), len(images), origin), len(images), origin)
        return self.encoder.encode(key, turns, [self.transform(image) for image in images], names)

    def collate(self, samples: list[Any]) -> Delivery | Failure:
        """Pads and stacks, and says which samples were bad; lets a failure pass."""
        failure = next((each for each in samples if isinstance(each, Failure)), None)
        return failure or Delivery(collate_training(samples, self.encoder.pad_id), bad_samples_of(samples))


class PipelineLoader(BatchLoader):
    """Batches of a pipeline; a worker's `UserError` arrives as it is.

    Args:
        stream: The samples.
        batch_size: Samples of a batch of this rank.
        num_workers: Processes that read and encode; 0 does it in this one.
        book: Counts bad samples.
        begin: Called before the first batch, from which on samples are counted.
    """

    endless = True

    def __init__(
        self,
        stream: PipelineSamples,
        batch_size: int,
        num_workers: int,
        book: BadSampleBook,
        begin: Callable[[], Any],
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
        self.begin()
        yield from super().__iter__()


def pictures_of(sample: Mapping[str, Any]) -> list[bytes | Image.Image]:
    """Returns the pictures of a sample in their order, each a file's content or decoded.

    Raises:
        UserError: If one is something else.
    """
    found = [value for name in PICTURES for value in _listed(sample.get(name))]
    named = [Member(name, 0, 0) for name in sample if is_used(name) and not is_text(name)]
    found += [sample[member.extension] for member in sorted(named, key=image_order)]
    for picture in found:
        if not isinstance(picture, bytes | Image.Image):
            raise UserError(
                f"expected pictures as bytes or PIL images, got {type(picture).__name__}. With webdataset use "
                '`decode("pil")`, or no `decode`.'
            )
    return found


def texts_of(sample: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the texts of a sample as files would hold them."""
    found = {name: sample[name] for name in ("json", "txt") if name in sample}
    if CONVERSATIONS in sample:
        found = {"json": {CONVERSATIONS: sample[CONVERSATIONS]}}
    return {name: value if isinstance(value, bytes) else _written(name, value) for name, value in found.items()}


def _written(name: str, value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value) if name == "json" else str(value)
    return text.encode("utf-8", "surrogatepass")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
