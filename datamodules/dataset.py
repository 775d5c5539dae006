"""Units of one or several shard folders as a torch dataset, and the loader that carries errors home."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.bad_samples import BadSample, BadSampleBook, bad_samples_of, placeholder
from datamodules.order import FILLER
from datamodules.reader import ShardReader
from datamodules.streaming import ShardError, StreamOptions
from moextend_pl.contracts import Batch, Sample, UserError
from moextend_pl.samples.collate import collate_generation, collate_training
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import PixelTransform, decode_image
from moextend_pl.samples.turns import single_turn

TURNS = ("together", "single")


@dataclass(frozen=True)
class Failure:
    """A user's mistake met in a worker, on its way to the main process.

    Attributes:
        message: The sentence for the user.
    """

    message: str


class Delivery(NamedTuple):
    """A batch on its way from a worker to the main process; a tuple, which torch's loader can pin.

    Attributes:
        batch: What the model gets.
        bad: Samples that placeholders stand for.
    """

    batch: Batch
    bad: list[BadSample]


class UnitTable:
    """Which unit is which: shard folders in a row, and with `single` every turn a unit of its own.

    Args:
        folders: Shard folders or addresses of remote ones; their units follow each other.
        turns: `together` (a unit is a conversation) or `single` (a unit is one turn).
        streaming: How remote folders are read.

    Raises:
        UserError: If `turns` is unknown, or a folder is no valid shard set.
    """

    def __init__(
        self, folders: Sequence[str | Path], turns: str = "together", streaming: StreamOptions | None = None
    ) -> None:
        if turns not in TURNS:
            raise UserError(f"Expected `turns` in {list(TURNS)}, got {turns!r}.")
        self.single = turns == "single"
        self.readers = [ShardReader(folder, streaming) for folder in folders]
        counts = np.concatenate([reader.turns() if self.single else np.ones(len(reader)) for reader in self.readers])
        counts = counts.astype(np.int64)
        self.sample = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        first = np.concatenate([[0], np.cumsum(counts)])
        self.turn = np.arange(len(self.sample), dtype=np.int64) - first[self.sample]
        self.ends = np.cumsum([len(reader) for reader in self.readers])
        shards = [len(shard) for reader in self.readers for shard in reader.shards]
        self.sizes = np.diff(first[np.concatenate([[0], np.cumsum(shards)])]).tolist()

    def __len__(self) -> int:
        return len(self.sample)

    def locate(self, unit: int) -> tuple[ShardReader, int, int | None]:
        """Returns reader, sample number inside it, and turn (None: all turns) of a unit."""
        number = int(self.sample[unit])
        folder = int(np.searchsorted(self.ends, number, side="right"))
        inside = number - (int(self.ends[folder - 1]) if folder else 0)
        return self.readers[folder], inside, int(self.turn[unit]) if self.single else None

    def fingerprint(self) -> str:
        """Returns a short digest of all shards and of what a unit is; equal for equal data."""
        text = [f"{shard.sha256} {len(shard)}" for reader in self.readers for shard in reader.shards]
        return hashlib.sha256("\n".join([str(self.single), *text]).encode()).hexdigest()[:16]


class ConversationDataset(Dataset[Sample]):
    """Reads, decodes and encodes units.

    Args:
        table: Which unit is which.
        encoder: Conversation -> ids and labels.
        generation: Whether samples are prompts for generation instead of training samples.
    """

    def __init__(self, table: UnitTable, encoder: ConversationEncoder, generation: bool = False) -> None:
        self.table = table
        self.encoder = encoder
        self.generation = generation
        self.transform = PixelTransform(encoder.spec)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, unit: int) -> Sample:
        """Returns one sample; `FILLER` gives the empty one, a damaged sample its placeholder.

        Raises:
            ShardError: If its whole shard cannot be used.
        """
        if unit == FILLER:
            return self.encoder.filler()
        reader, number, turn = self.table.locate(unit)
        try:
            return self._sample(reader, number, turn)
        except ShardError:
            raise
        except UserError as error:
            shard, key = reader.describe(number)
            reason = str(error).removeprefix(f"{shard}: {key}: ")
            return placeholder(self.encoder.filler(), BadSample(shard, key, reason))

    def _sample(self, reader: ShardReader, number: int, turn: int | None) -> Sample:
        raw = reader.read(number)
        key, turns, images = raw.key, raw.turns, raw.images
        if turn is not None:
            one, which = single_turn(turns, turn, len(images))
            key, turns, images = f"{key}#{turn}", (one,), tuple(images[i] for i in which)
        pixels = [self.transform(decode_image(data, raw.origin)) for data in images]
        # Named by content: the same picture has the same name in whatever sample it lies.
        names = [hashlib.blake2b(data, digest_size=8).hexdigest() for data in images]
        encode = self.encoder.encode_prompt if self.generation else self.encoder.encode
        return encode(key, turns, pixels, names)

    def __getitems__(self, units: Sequence[int]) -> list[Sample] | Failure:
        """Returns the samples of a batch, or the first mistake met; torch's fetcher calls this."""
        try:
            return [self[unit] for unit in units]
        except UserError as error:
            return Failure(str(error))

    def collate(self, samples: list[Sample] | Failure) -> Delivery | Failure:
        """Pads and stacks, and says which samples were bad; lets a failure pass."""
        if isinstance(samples, Failure):
            return samples
        collate: Callable[..., Batch] = collate_generation if self.generation else collate_training
        return Delivery(collate(samples, self.encoder.pad_id), bad_samples_of(samples))


class BatchLoader:
    """Batches of a dataset; a worker's `UserError` arrives as it is, without the worker's traceback.

    Not a torch loader but around one: Lightning takes torch's loaders apart to put samplers of its own
    into them, for predictions even when told not to.

    Args:
        dataset: The samples.
        batches: Which units form which batch.
        num_workers: Processes that read and encode; 0 does it in this one.
        book: Counts bad samples; the first one stops if None.
    """

    def __init__(
        self,
        dataset: ConversationDataset,
        batches: Sampler[list[int]],
        num_workers: int,
        book: BadSampleBook | None = None,
    ) -> None:
        self.dataset = dataset
        self.book = book
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=dataset.collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=one_thread,
        )

    def __len__(self) -> int:
        return len(self.loader)  # the endless sampler has no length, so neither has its loader

    def __iter__(self) -> Iterator[Batch]:
        for delivery in self.loader:
            if isinstance(delivery, Failure):
                raise UserError(delivery.message)
            if delivery.bad:
                self._note(delivery.bad)
            yield delivery.batch

    def _note(self, bad: list[BadSample]) -> None:
        if self.book is None:
            raise UserError(f"{bad[0].shard}: {bad[0].key}: {bad[0].reason}")
        self.book.note(bad)


def one_thread(_worker: int) -> None:
    """Keeps each worker to one thread: many workers with many threads each slow each other down."""
    torch.set_num_threads(1)
