"""The three shard sets of a data set that brings its own tokenizer: captions, questions about pictures, texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from datamodules.index import Shard
from datamodules.shards import Entry, is_shard_folder, replace_folder, write_shards
from datamodules.word_tokenizer import word_tokenizer
from moextend_pl.samples.turns import IMAGE_MARK

SETS = ("captions", "vqa", "text")
SPLITS = ("train", "val", "test")
TOKENIZER = "tokenizer"
DESCRIBE = "describe the image."


def write_sets(
    out: Path,
    entries_of: Callable[[str], Mapping[str, list[Entry]]],
    samples_per_shard: int,
    words: Iterable[str] = (),
) -> dict[str, list[Shard]]:
    """Writes `captions`, `vqa` and `text`, each with `train`, `val` and `test`, and a tokenizer of their train texts.

    Args:
        out: Folder to write; takes its place only when all is written.
        entries_of: Gives the entries of each set for a split.
        samples_per_shard: Samples of each shard but the last.
        words: Further texts that the tokenizer has to know.

    Returns:
        `set/split` -> its shards.

    Raises:
        UserError: If the folder holds something else.
    """
    shards: dict[str, list[Shard]] = {}
    texts = set(words)
    with replace_folder(Path(out), is_set_folder) as folder:
        for split in SPLITS:
            for name, entries in entries_of(split).items():
                target = folder / name / split
                target.mkdir(parents=True)
                shards[f"{name}/{split}"] = write_shards(entries, target, samples_per_shard)
                if split == "train":
                    texts |= {turn["value"].replace(IMAGE_MARK, "") for e in entries for turn in e.conversations}
        word_tokenizer(texts).save_pretrained(folder / TOKENIZER)
    return shards


def is_set_folder(folder: Path) -> bool:
    """Tells whether a folder is what `write_sets` writes, and nothing else."""
    if {path.name for path in folder.iterdir()} != {*SETS, TOKENIZER}:
        return False
    parts = [folder / name / split for name in SETS for split in SPLITS]
    return all(part.is_dir() and is_shard_folder(part) for part in parts)
