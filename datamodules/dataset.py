"""Units of one or several shard folders as a torch dataset, and the loader that carries errors home."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.bad_samples import BadSample, BadSampleBook, bad_samples_of, placeholder
from datamodules.kept import Kept
from datamodules.order import FILLER
from datamodules.reader import RawSample, ShardReader
from datamodules.streaming import ShardError, StreamOptions
from datamodules.workers import worker_options
from moextend_pl.contracts import Batch, Sample, UserError
from moextend_pl.samples.collate import collate_generation, collate_packed, collate_training
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import PixelTransform, content_name, decode_image, open_image
from moextend_pl.samples.sound.features import SoundTransform, with_sounds

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
        tasks: Task of each folder; none has one if empty.
        streaming: How remote folders are read.

    Raises:
        UserError: If `turns` is unknown, or a folder is no valid shard set.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        turns: str = "together",
        tasks: Sequence[str] = (),
        streaming: StreamOptions | None = None,
    ) -> None:
        if turns not in TURNS:
            raise UserError(f"Expected `turns` in {list(TURNS)}, got {turns!r}.")
        self.single = turns == "single"
        self.readers = [ShardReader(folder, streaming) for folder in folders]
        self.tasks = tuple(tasks) or ("",) * len(self.readers)
        turns_of = [one.turns() if self.single else np.ones(len(one)) for one in self.readers]
        counts = np.concatenate(turns_of).astype(np.int64)
        self.sample = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        first = np.concatenate([[0], np.cumsum(counts)])
        self.turn = np.arange(len(self.sample), dtype=np.int64) - first[self.sample]
        self.ends = np.cumsum([len(reader) for reader in self.readers])
        shards = [len(shard) for reader in self.readers for shard in reader.shards]
        self.sizes = np.diff(first[np.concatenate([[0], np.cumsum(shards)])]).tolist()

    def __len__(self) -> int:
        return len(self.sample)

    def sizes_by_folder(self) -> list[list[int]]:
        """Returns the units of each shard, folder by folder."""
        sizes = iter(self.sizes)
        return [[next(sizes) for _ in reader.shards] for reader in self.readers]

    def task(self, unit: int) -> str:
        """Returns the task of the folder that a unit lies in."""
        return self.tasks[int(np.searchsorted(self.ends, self.sample[unit], side="right"))]

    def locate(self, unit: int) -> tuple[ShardReader, int, int | None]:
        """Returns reader, sample number inside it, and turn (None: all turns) of a unit."""
        number = int(self.sample[unit])
        folder = int(np.searchsorted(self.ends, number, side="right"))
        inside = number - (int(self.ends[folder - 1]) if folder else 0)
        return self.readers[folder], inside, int(self.turn[unit]) if self.single else None

    def fingerprint(self, folder: int | None = None) -> str:
        """Returns a short digest of all shards, or of one folder's, and of what a unit is; equal for equal data."""
        readers = self.readers if folder is None else [self.readers[folder]]
        text = [f"{shard.sha256} {len(shard)}" for reader in readers for shard in reader.shards]
        return hashlib.sha256("\n".join([str(self.single), *text]).encode()).hexdigest()[:16]


class ConversationDataset(Dataset[Sample]):
    """Reads, decodes and encodes units.

    Args:
        table: Which unit is which.
        encoder: Conversation -> ids and labels.
        generation: Whether samples are prompts for generation instead of training samples.
        packed: Whether a row of a batch is made of several units.
        keep: Bytes of samples, and again of decoded pictures, that are kept in memory once they were read.
    """

    def __init__(
        self,
        table: UnitTable,
        encoder: ConversationEncoder,
        generation: bool = False,
        packed: bool = False,
        keep: int = 0,
    ) -> None:
        self.table = table
        self.encoder = encoder
        self.generation = generation
        self.packed = packed
        self.transform, self.listen = PixelTransform(encoder.spec), SoundTransform(encoder.spec)
        self._raw = Kept[RawSample](keep, RawSample.size)
        self._squares = Kept[np.ndarray](keep, _bytes_of_features)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, unit: int) -> Sample:
        """Returns one sample; `FILLER` gives the empty one, a damaged sample its placeholder.

        Raises:
            ShardError: If its whole shard cannot be used.
        """
        if unit == FILLER:
            return self.encoder.filler()
        try:
            return self._sample(unit)
        except ShardError:
            raise
        except UserError as error:
            reader, number, _ = self.table.locate(unit)
            shard, key = reader.describe(number)
            reason = str(error).removeprefix(f"{shard}: {key}: ")
            return placeholder(self.encoder.filler(), BadSample(shard, key, reason))

    def _sample(self, unit: int) -> Sample:
        raw = self.read(unit)
        names, heard = list(map(content_name, raw.images)), list(map(content_name, raw.sounds))
        pixels = [self._pixels(name, data, raw.origin) for name, data in zip(names, raw.images, strict=True)]
        encode = self.encoder.encode_prompt if self.generation else self.encoder.encode
        sample = replace(encode(raw.key, raw.turns, pixels, names), task=self.table.task(unit))
        found = zip(heard, raw.sounds, strict=True)
        sounds = [self._squares.get(name, partial(self.listen, data, raw.origin)) for name, data in found]
        return with_sounds(sample, self.encoder.spec, sounds, heard)

    def _pixels(self, name: str, data: bytes, origin: str) -> torch.Tensor:
        levels = self._squares.get(
            name, lambda: np.ascontiguousarray(self.transform.levels(decode_image(data, origin)))
        )
        return self.transform.normalised(levels)

    def read(self, unit: int) -> RawSample:
        """Returns a unit as it lies in its shard; a turn of its own has its number behind the key.

        Raises:
            UserError: If the sample is damaged.
        """
        reader, number, turn = self.table.locate(unit)
        raw = self._raw.get(int(self.table.sample[unit]), lambda: reader.read(number))
        if turn is not None and turn >= len(raw.turns):
            raise UserError(
                f"{raw.origin}: the index says that it has turn {turn}, got {len(raw.turns)} turn(s). Run `python -m "
                "moextend_pl shards index` on its folder."
            )
        return raw if turn is None else raw.single(turn)

    def length(self, unit: int) -> int:
        """Returns the tokens of a unit; 1 if it is damaged, which is said when it is due."""
        try:
            raw = self.read(unit)
            cut = raw.images if self.transform.tiling.most else ()  # the size decides, which an image's head tells
            squares = tuple(self.transform.squares(open_image(data, raw.origin)) for data in cut)
            return max(1, self.encoder.length(raw.turns, squares))
        except ShardError:
            raise
        except UserError:
            return 1

    def __getitems__(self, rows: Sequence[Any]) -> list[Sample] | list[list[Sample]] | Failure:
        """Returns the samples of a batch, or the first mistake met; torch's fetcher calls this.

        A row is a unit, or several where samples are packed.
        """
        try:
            if self.packed:
                return [[self[unit] for unit in row] for row in rows]
            return [self[unit] for unit in rows]
        except UserError as error:
            return Failure(str(error))
        except (OSError, MemoryError) as error:
            return _failure(error)

    def collate(self, samples: list[Any] | Failure) -> Delivery | Failure:
        """Pads and stacks, and says which samples were bad; lets a failure pass."""
        if isinstance(samples, Failure):
            return samples
        collate: Callable[..., Batch] = collate_packed if self.packed else collate_training
        try:
            batch = (collate_generation if self.generation else collate)(samples, self.encoder.pad_id)
        except MemoryError as error:
            return _failure(error)
        return Delivery(batch, bad_samples_of(itertools.chain(*samples) if self.packed else samples))


def _bytes_of_features(features: np.ndarray) -> int:
    return features.nbytes


def _failure(error: OSError | MemoryError) -> Failure:
    if isinstance(error, MemoryError):
        return Failure(
            "There is not enough memory for a batch. Lower `batch_size` or `num_workers` of the data module."
        )
    place = f" {error.filename}" if error.filename else ""
    return Failure(f"The data cannot be read{place}: {error.strerror or error}. Mend that; the same command continues.")


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
        batches: Sampler[list[Any]],
        num_workers: int,
        book: BadSampleBook | None = None,
    ) -> None:
        self.dataset = dataset
        self.book = book
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=dataset.collate,
            pin_memory=torch.cuda.is_available(),
            **worker_options(num_workers),
        )

    @property
    def endless(self) -> bool:
        """Whether the loader never runs dry, on any rank."""
        return not hasattr(self.loader.batch_sampler, "__len__")

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
