"""`python -m moextend_pl shards`: build, check and show shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

from datamodules.dataset import ConversationDataset, UnitTable
from datamodules.easy_vqa import build_easy_vqa
from datamodules.index import Shard, file_sha256, index_shard, load_index
from datamodules.reader import ShardReader
from datamodules.scenes import IMAGES, build_scenes
from datamodules.sets import SPLITS, TOKENIZER
from datamodules.shards import SAMPLES_PER_SHARD, build_from_llava
from moextend_pl.contracts import IGNORE_INDEX, Sample, SampleSpec, UserError
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import decode_image, open_image

GREEN, GREY, PLAIN = "\033[32m", "\033[90m", "\033[0m"


def main(argv: list[str]) -> int:
    """Runs one `shards` command.

    Args:
        argv: What follows `shards` on the command line.

    Returns:
        0 if all is well, 1 if `check` found something wrong.

    Raises:
        UserError: If the input cannot be used.
    """
    options = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moextend_pl shards", description="Build, check and show shards.")
    commands = parser.add_subparsers(required=True, metavar="command")
    build = commands.add_parser("build", help="write shards").add_subparsers(required=True, metavar="source")

    easy = build.add_parser("easy-vqa", help="captions, questions and texts of the package easy_vqa, and a tokenizer")
    easy.add_argument("--out", type=Path, required=True, help="folder to write")
    _shard_option(easy)
    easy.set_defaults(run=_build_easy_vqa)

    scenes = build.add_parser("scenes", help="the same sets of drawn scenes with several shapes, harder than easy-vqa")
    scenes.add_argument("--out", type=Path, required=True, help="folder to write")
    scenes.add_argument("--images", type=int, default=IMAGES, help=f"(default {IMAGES})")
    scenes.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default 0)")
    _shard_option(scenes)
    scenes.set_defaults(run=_build_scenes)

    llava = build.add_parser("llava", help="shards of a LLaVA JSON file and a folder of images")
    llava.add_argument("--json", type=Path, required=True, help="list of {id, image, conversations}")
    llava.add_argument("--images", type=Path, required=True, help="folder that the image names start from")
    llava.add_argument("--out", type=Path, required=True, help="folder to write")
    _shard_option(llava)
    llava.set_defaults(run=_build_llava)

    check = commands.add_parser("check", help="compare shards with their index and decode every member")
    check.add_argument("folder", type=Path)
    check.set_defaults(run=_check)

    show = commands.add_parser("show", help="print one sample; with a tokenizer also what is learned of it")
    show.add_argument("folder", type=Path)
    show.add_argument("key")
    show.add_argument("--tokenizer", type=Path, help="folder of a tokenizer with a chat template")
    show.add_argument("--tokens-per-image", type=int, default=16, help="placeholders of one image (default 16)")
    show.add_argument("--max-length", type=int, help="cut as training would (default: no limit)")
    show.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    show.set_defaults(run=_show)
    return parser


def _shard_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help=f"(default {SAMPLES_PER_SHARD})"
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _progress(items: Iterable[Any], unit: str = "sample") -> Iterable[Any]:
    return tqdm(items, unit=unit, disable=None)  # None: silent where nobody watches


def _say_sets(out: Path, sets: dict[str, list[Shard]]) -> None:
    for name, shards in sets.items():
        _say(_counts(out / name, shards))
    _say(f"{out / TOKENIZER}: word-level tokenizer")


def _build_easy_vqa(options: argparse.Namespace) -> int:
    sets = build_easy_vqa(options.out, options.samples_per_shard)
    _say_sets(options.out, sets)
    for split in SPLITS:
        total, known = (sum(map(len, sets[f"{name}/{split}"])) for name in ("vqa", "captions"))
        _say(f"{split}: {total - known} of {total} images are in vqa only; their questions leave colour or shape open")
    return 0


def _build_scenes(options: argparse.Namespace) -> int:
    _say_sets(options.out, build_scenes(options.out, options.images, options.seed, options.samples_per_shard))
    return 0


def _build_llava(options: argparse.Namespace) -> int:
    shards = build_from_llava(options.json, options.images, options.out, options.samples_per_shard, _progress)
    _say(_counts(options.out, shards))
    return 0


def _counts(folder: Path, shards: list[Shard]) -> str:
    samples = sum(map(len, shards))
    turns = sum(int(shard.turns.sum()) for shard in shards)
    images = sum(len(shard.members) for shard in shards) - samples
    size = sum(shard.size for shard in shards) / 2**20
    return f"{folder}: {len(shards)} shards, {samples} samples, {images} images, {turns} turns, {size:.1f} MiB"


def _check(options: argparse.Namespace) -> int:
    folder: Path = options.folder
    shards = load_index(folder)
    known = {shard.name for shard in shards}
    problems = [f"{path.name}: not in the index" for path in sorted(folder.glob("*.tar")) if path.name not in known]
    for shard in _progress(shards, "shard"):
        problems += [f"{shard.name}: {problem}" for problem in _shard_problems(folder / shard.name, shard)]
    if not problems:
        problems = _sample_problems(ShardReader(folder))
    for problem in problems:
        _say(problem)
    _say(_counts(folder, shards))
    _say(f"{len(problems)} problem(s)" if problems else "ok")
    return 1 if problems else 0


def _shard_problems(path: Path, shard: Shard) -> list[str]:
    """Compares a shard with its part of the index."""
    if not path.is_file():
        return ["missing"]
    size = path.stat().st_size
    if size != shard.size:
        return [f"the index says {shard.size} bytes, the file has {size}"]
    if file_sha256(path) != shard.sha256:
        return ["the content differs from what was indexed (sha256)"]
    try:
        found = index_shard(path)
    except UserError as error:
        return [str(error)]
    return [] if found.to_dict() == shard.to_dict() else ["the index lists other samples than the file holds"]


def _sample_problems(reader: ShardReader) -> list[str]:
    """Reads and decodes every sample."""
    problems = []
    for number in _progress(range(len(reader))):
        try:
            raw = reader.read(number)
            for data in raw.images:
                decode_image(data, raw.origin)
        except UserError as error:
            problems.append(str(error))
    return problems


def _show(options: argparse.Namespace) -> int:
    reader = ShardReader(options.folder)
    keys = [key for shard in reader.shards for key in shard.keys]
    if options.key not in keys:
        some = ", ".join(keys[:3])
        raise UserError(f"Expected a key of {options.folder}, such as {some}; got {options.key!r}.")
    number = keys.index(options.key)
    raw = reader.read(number)
    _say(raw.origin)
    for position, data in enumerate(raw.images):
        image = open_image(data, raw.origin)
        _say(f"image {position}: {image.format} {image.size[0]} x {image.size[1]} {image.mode}, {len(data)} bytes")
    for turn in raw.turns:
        _say(f"human: {turn.human}\ngpt:   {turn.gpt}")
    if options.tokenizer:
        _show_labels(options, number)
    return 0


def _show_labels(options: argparse.Namespace, number: int) -> None:
    """Prints the ids; learned ones are green, or stand in brackets where there is no colour."""
    if not options.tokenizer.is_dir():
        raise UserError(f"Expected a tokenizer's folder at {options.tokenizer}, found none (cwd {Path.cwd()}).")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True)
    spec = SampleSpec(tokenizer, len(tokenizer), options.tokens_per_image, image_size=32)
    dataset = ConversationDataset(UnitTable([options.folder]), ConversationEncoder(spec, options.max_length))
    colour = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())
    sample = dataset[number]
    learned = int((sample.labels != IGNORE_INDEX).sum())
    _say(f"ids: {len(sample.input_ids)}, learned: {learned} ({'green' if colour else 'in [brackets]'})")
    _say(" ".join(_marked(sample, spec, colour)))


def _marked(sample: Sample, spec: SampleSpec, colour: bool) -> list[str]:
    out: list[str] = []
    run = 0
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token == spec.image_token_id:
            run += 1
            if position + 1 == len(ids) or ids[position + 1] != token:
                out.append(f"{GREY if colour else ''}<image>*{run}{PLAIN if colour else ''}")
                run = 0
            continue
        text = f"{spec.tokenizer.convert_ids_to_tokens(token)}:{token}"
        if label == IGNORE_INDEX:
            out.append(f"{GREY}{text}{PLAIN}" if colour else text)
        else:
            out.append(f"{GREEN}{text}{PLAIN}" if colour else f"[{text}]")
    return out
