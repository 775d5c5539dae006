"""How many tokens each unit takes: counted once for a tokenizer, then read from a file beside the shards."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datamodules.dataset import ConversationDataset, Failure
from datamodules.workers import worker_options
from moextend_pl.contracts import UserError
from moextend_pl.samples.conversation import ConversationEncoder

LENGTHS_SCHEMA = "2"
"""Raised when the same conversation comes to be encoded otherwise, so that files of before are not used."""

CHUNK = 256
log = logging.getLogger(__name__)


class _Chunks(Dataset[np.ndarray | Failure]):
    """Lengths of the units first .. last - 1, some hundred at a time."""

    def __init__(self, dataset: ConversationDataset, first: int, last: int) -> None:
        self.dataset = dataset
        self.first = first
        self.last = last

    def __len__(self) -> int:
        return -(-(self.last - self.first) // CHUNK)

    def __getitem__(self, number: int) -> np.ndarray | Failure:
        start = self.first + number * CHUNK
        units = range(start, min(start + CHUNK, self.last))
        try:
            return np.array([self.dataset.length(unit) for unit in units], dtype=np.int32)
        except UserError as error:
            return Failure(str(error))


def unit_lengths(dataset: ConversationDataset, run: Path | None, num_workers: int) -> np.ndarray:
    """Returns the tokens of each unit, (n,) int32, as training would encode it.

    Kept for each folder as `lengths-<fingerprint>.npy` beside its shards or, where that folder cannot be
    written to, in the run directory. The fingerprint covers shards, tokenizer and chat template, tokens and tiles of
    an image, longest sequence, and what a unit is.
    """
    table = dataset.table
    bounds = np.cumsum([0] + [sum(sizes) for sizes in table.sizes_by_folder()]).tolist()
    lengths = []
    for number, reader in enumerate(table.readers):
        name = f"lengths-{_fingerprint(dataset.encoder, table.fingerprint(number))}.npy"
        places = [folder / name for folder in (reader.folder, run) if folder is not None]
        count = bounds[number + 1] - bounds[number]
        found = next((kept for place in places if (kept := _kept(place, count)) is not None), None)
        if found is not None:
            lengths.append(found)
            continue
        log.info("counting the tokens of %d samples in %s, once", count, reader.source)
        lengths.append(_count(_Chunks(dataset, bounds[number], bounds[number + 1]), num_workers))
        _keep(lengths[-1], places)
    return np.concatenate(lengths)


def _count(chunks: _Chunks, num_workers: int) -> np.ndarray:
    loader: DataLoader[np.ndarray | Failure] = DataLoader(chunks, batch_size=None, **worker_options(num_workers))
    counted = []
    for chunk in tqdm(loader, unit_scale=CHUNK, unit="sample", desc="lengths", disable=None):
        if isinstance(chunk, Failure):
            raise UserError(chunk.message)
        counted.append(np.asarray(chunk))
    return np.concatenate(counted)


def _kept(place: Path, count: int) -> np.ndarray | None:
    """Reads the file; None if it is not there or damaged, as by a full disk: then it is counted again."""
    try:
        lengths = np.load(place, allow_pickle=False)
        if lengths.shape == (count,) and lengths.dtype.kind in "iu" and (lengths >= 1).all():
            return lengths
    except Exception as error:  # numpy raises whatever it likes on damaged files
        log.debug("%s cannot be read (%s)", place, error)
    return None


def _keep(lengths: np.ndarray, places: list[Path]) -> None:
    """Writes the file to the first place that takes it; without one it is counted again next time."""
    for place in places:
        partial = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                np.save(stream, lengths, allow_pickle=False)
            partial.replace(place)
        except OSError as error:
            partial.unlink(missing_ok=True)
            log.info("%s cannot be written (%s)", place, error.strerror)
        else:
            return


def _fingerprint(encoder: ConversationEncoder, shards: str) -> str:
    spec = encoder.spec
    tokenizer = spec.tokenizer
    words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
    facts = [
        LENGTHS_SCHEMA,
        shards,
        words,
        str(tokenizer.chat_template),
        str(sorted(tokenizer.special_tokens_map.items())),  # templates write them
        str(spec.tokens_per_image),
        str(encoder.max_length),
        *((spec.tiles, str(spec.image_size)) if spec.tiles else ()),
        *(["thumbnail"] if spec.thumbnail else ()),
        *((str(spec.tokens_per_sound),) if spec.sounds else ()),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
