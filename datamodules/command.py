"""`python -m moextend_pl shards`: build, index, check and show shards."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from datamodules.audit import AuditOptions, audit, totals
from datamodules.cache import Source
from datamodules.compare import compare
from datamodules.index import ARRAYS_FILE, INDEX_FILE
from datamodules.llava import BuildOptions, Built, Progress, build_shards
from datamodules.own_data import FORMS, hold_out, read_data
from datamodules.own_sets import add_own_sets, say, shard_option
from datamodules.questions import write_questions
from datamodules.scan import build_index, index_shard
from datamodules.shards import SKIPPED_FILE
from datamodules.show import describe_labels, describe_sample, find_sample, save_picture
from datamodules.tables import COLUMNS
from moextend_pl.contracts import UserError

SHOWN_FAULTS = 20
FOLDER = "folder, or the address of a remote one"


def main(argv: list[str]) -> int:
    """Runs one `shards` command.

    Returns:
        0 if all is well, 1 if `check` found something wrong.

    Raises:
        UserError: If the input cannot be used, or a file cannot be read or written.
    """
    options = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except OSError as error:
        place = error.filename or "a file"
        raise UserError(
            f"Expected to read and write {place}, got: {error.strerror or error}. Give another place, or mend this one."
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moextend_pl shards", description="Build, index, check and show shards of samples."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_build(commands.add_parser("build", help="write shards").add_subparsers(required=True, metavar="source"))

    index = commands.add_parser("index", help="write the index of shards of others: WebDataset, img2dataset")
    index.add_argument("folder", type=Path, help="folder, or its shards as in 'set/{000..099}.tar'")
    index.set_defaults(run=_index)

    check = commands.add_parser("check", help="compare shards with their index and decode every member")
    check.add_argument("folder", help=FOLDER)
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    _workers_option(check)
    _tokenizer_options(check, "a tokenizer with a chat template: count tokens and what is learned of them")
    check.set_defaults(run=_check)

    show = commands.add_parser("show", help="print one sample; with a tokenizer also what is learned of it")
    show.add_argument("folder", help=FOLDER)
    show.add_argument("key")
    show.add_argument("--png", type=Path, metavar="FILE", help="write the sample's images to this file")
    show.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    _tokenizer_options(show, "folder of a tokenizer with a chat template")
    show.set_defaults(run=_show)

    compared = commands.add_parser("compare", help="what of a test set can be answered without looking, or was seen")
    compared.add_argument("train", help=FOLDER)
    compared.add_argument("test", help=FOLDER)
    compared.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file too")
    compared.set_defaults(run=_compare)

    questions = commands.add_parser("questions", help="write what the samples ask as a test set, to be evaluated on")
    questions.add_argument("folder", help=FOLDER)
    questions.add_argument("--out", type=Path, required=True, help="folder to write; `evaluate` reads it as own/")
    questions.add_argument("--limit", type=int, default=1000, help="most questions (default 1000)")
    questions.set_defaults(run=_questions)
    return parser


def _add_build(build: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add_own_sets(build)

    about = (
        "Writes shards and their index; the bytes do not depend on --workers. The same command goes on where a stopped "
        "one was."
    )
    data = build.add_parser("data", help="shards of your own data, whatever their form", description=about)
    data.add_argument("place", type=Path, help=FORMS)
    data.add_argument("--images", type=Path, help="folder that the image names start from (default: the file's own)")
    data.add_argument("--val", type=Path, help="folder for about one picture in twenty, held out to measure on")
    data.add_argument("--question", help="what every picture is asked where the data hold no question")
    data.add_argument("--columns", help="columns of a table, as picture=NAME,question=NAME,answer=NAME")
    llava = build.add_parser("llava", help="the same for a file of conversations", description=about)
    llava.add_argument(
        "--json", dest="place", type=Path, required=True, help="LLaVA's, ShareGPT's or OpenAI's JSON or JSON Lines"
    )
    llava.add_argument("--images", type=Path, required=True, help="folder that the image names start from")
    llava.set_defaults(question=None, columns=None, val=None)
    for parser in (data, llava):
        _image_options(parser)
        _workers_option(parser)
        shard_option(parser)
        parser.set_defaults(run=_build_own)


def _image_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--resize", type=int, metavar="SIDE", help="shrink larger images to JPEGs whose shorter side is SIDE"
    )
    parser.add_argument(
        "--square", action="store_true", help="with --resize, stretch them to SIDE x SIDE, for towers that squash"
    )
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of what --resize shrinks (default 90)")
    parser.add_argument("--skip-bad", action="store_true", help=f"leave bad entries out, listed in {SKIPPED_FILE}")


def _workers_option(parser: argparse.ArgumentParser) -> None:
    cores = min(os.cpu_count() or 1, 16)
    parser.add_argument("--workers", type=int, default=cores, help=f"processes (default {cores}, by the cores here)")


def _tokenizer_options(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--tokenizer", type=Path, help=text)
    parser.add_argument("--tokens-per-image", type=int, default=16, help="placeholders of one image (default 16)")
    parser.add_argument("--max-length", type=int, help="cut as training would (default: no limit)")


def _build_own(options: argparse.Namespace) -> int:
    data = read_data(options.place, options.images, options.question, _columns(options.columns))
    for line in data.told:
        say(line)
    names = ("samples_per_shard", "workers", "resize", "square", "quality", "skip_bad")
    how = BuildOptions(**{name: getattr(options, name) for name in names})
    parts = [(data, options.out)]
    if options.val is not None:
        if options.val.resolve() == options.out.resolve():
            raise UserError(f"Expected two folders as `--out` and `--val`, got {options.out} for both. Name another.")
        learned, measured = hold_out(data)
        parts = [(learned, options.out), (measured, options.val)]
    for part, out in parts:
        with _progress() as progress:
            _say_built(build_shards(part, out, how, progress), out, options.resize is not None)
    return 0


def _say_built(built: Built, out: Path, resized: bool) -> None:
    say(totals(out, built.shards))
    if built.renamed:
        say(f"{built.renamed} entries got a key of their own: their id was taken, or held a dot")
    if built.unnamed:
        say(f"{built.unnamed} entries have no id and are named by their number")
    for what, count in sorted(built.done.dropped.items()):
        say(f"left out: {count} {what}")
    if resized:
        before, after = built.done.bytes_before / 2**20, built.done.bytes_after / 2**20
        say(f"images: {before:.1f} MiB as files, {after:.1f} MiB in the shards")
    if built.done.problems:
        say(f"{len(built.done.problems)} problem(s): see {out / SKIPPED_FILE} for what was left out")


def _columns(text: str | None) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    if not all(what in COLUMNS and name for what, _, name in pairs):
        raise UserError(f"Expected `--columns` as picture=NAME,question=NAME,answer=NAME, got {text!r}. Mend it.")
    return {what: name for what, _, name in pairs}


def _index(options: argparse.Namespace) -> int:
    source = Source(options.folder)
    folder = Path(source.place)
    if not folder.is_dir():
        raise UserError(f"Expected a folder with shards at {folder}, found none (cwd {Path.cwd()}).")
    faults: list[str] = []
    skipped: Counter[str] = Counter()
    named = None if source.names is None else (index_shard(folder / name, faults, skipped) for name in source.names)
    shards = build_index(folder, faults, named, skipped)
    for fault in faults[:SHOWN_FAULTS]:
        say(fault)
    say(totals(folder, shards))
    for what, count in skipped.most_common(SHOWN_FAULTS):
        say(f"skipped: {count} member(s) {what!r}, of which no sample is made")
    say(f"wrote {INDEX_FILE} and {ARRAYS_FILE}")
    if faults:
        say(f"{len(faults)} sample(s) cannot be used; training counts them as bad samples (`max_bad_samples`)")
    return 0


def _check(options: argparse.Namespace) -> int:
    tokenizer = str(options.tokenizer) if options.tokenizer else None
    how = AuditOptions(options.workers, tokenizer, options.tokens_per_image, options.max_length)
    with _progress() as progress:
        report = audit(options.folder, how, progress)
    say(json.dumps(report.to_dict(), indent=1) if options.json else "\n".join(report.lines()))
    return 1 if report.found.problems else 0


def _show(options: argparse.Namespace) -> int:
    raw = find_sample(options.folder, options.key)
    lines = describe_sample(raw)
    if options.tokenizer:
        colour = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())
        lines += describe_labels(raw, options.tokenizer, options.tokens_per_image, options.max_length, colour)
    if options.png:
        lines.append(save_picture(raw, options.png))
    say("\n".join(lines))
    return 0


def _compare(options: argparse.Namespace) -> int:
    found = compare(options.train, options.test)
    say(f"{found.shared_pictures} of {found.pictures} pictures are, by their pixels, in {options.train} too")
    share = f"{found.blind_accuracy:.1%} of {found.questions} questions"
    say(f"the most frequent answer of {options.train} to the same words answers {share}")
    if options.json is not None:
        numbers = {**asdict(found), "blind_accuracy": found.blind_accuracy}
        options.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0


def _questions(options: argparse.Namespace) -> int:
    if options.limit < 1:
        raise UserError(f"Expected `--limit` of at least 1, got {options.limit}. Leave it out for 1000.")
    count, left = write_questions(options.folder, options.out, options.limit)
    say(f"{options.out}: {count} questions")
    for what, number in sorted(left.items()):
        say(f"left out: {number} {what}")
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Shows how many samples are done and the time that is left."""
    with tqdm(unit="sample", disable=None) as bar:  # None: silent where nobody watches

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
