"""Steps in a folder, each with a receipt: what is there and valid is skipped, what was stopped goes on.

A step whose configuration changed starts anew, and so do all steps after it.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from moextend_pl.cli.commands import run
from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import read_json, write_json, write_text
from moextend_pl.runs.fingerprints import file_sha256

log = logging.getLogger(__name__)

RECEIPT, DIGEST, SECONDS = "stage.json", "config.sha256", "seconds.json"


@dataclass(frozen=True)
class Step:
    """One step of a recipe; a stage of its configurations where it is no other kind.

    Attributes:
        name: Name of the step, and of its folder.
        purpose: What a person sees while it runs.
        share: Its usual share of the whole time, for the time left.
        build: What writes the files of its folder, for steps on whose files later ones rest.
    """

    name: str
    purpose: str
    share: float
    build: Callable[[Path], object] | None = None


@dataclass(frozen=True)
class Recipe:
    """Steps that one command runs.

    Attributes:
        command: Name of the command.
        configs: Folder of the stage files.
        out: Where the stage files have their runs.
        steps: In order.
        baselines: Names of the steps that may be left out.
        report: Measures what is there and returns where it wrote it; given folder, stage files and seconds of steps.
        reports: Names of the steps that are done by it.
    """

    command: str
    configs: Path
    out: str
    steps: tuple[Step, ...]
    baselines: tuple[str, ...]
    report: Callable[[Path, Path, Mapping[str, float]], Path]
    reports: tuple[str, ...]

    @property
    def essential(self) -> list[str]:
        """Names of the steps that are never left out."""
        return [step.name for step in self.steps if step.name not in self.baselines]


class Runner:
    """Runs the steps of a recipe in order inside one folder.

    Args:
        recipe: The steps.
        out: Folder of all runs.
        overrides: Further options given to every `fit`, for example `--trainer.max_steps=5`.
        until: Name of the last step; all if empty.
    """

    def __init__(self, recipe: Recipe, out: Path, overrides: Sequence[str] = (), until: str = "") -> None:
        self.recipe, self.out, self.overrides, self.until = recipe, out, list(overrides), until
        self.configs = out / "configs"
        self.seconds: dict[str, float] = {}
        self._digest = hashlib.sha256(" ".join(self.overrides).encode()).hexdigest()

    def run(self, leave_out: Collection[str] = ()) -> None:
        """Runs or skips every step but those that are left out."""
        self._write_configs()
        path = self.out / SECONDS
        self.seconds = {name: float(value) for name, value in read_json(path).items()}
        steps = [step for step in self.recipe.steps if step.name not in leave_out]
        names = [step.name for step in steps]
        steps = steps[: names.index(self.until) + 1] if self.until else steps
        started, done = time.monotonic(), 0.0
        for number, step in enumerate(steps, start=1):
            left = _time_left(started, done, sum(s.share for s in steps[number - 1 :]))
            log.info("[%d/%d] %s: %s%s", number, len(steps), step.name, step.purpose, left)
            begin = time.monotonic()
            if self._do(step):
                done += step.share
                self._add_seconds(step.name, time.monotonic() - begin)

    def _do(self, step: Step) -> bool:
        if step.name in self.recipe.reports:
            path = self.recipe.report(self.out, self.configs, self.seconds)
            log.info("the report is in %s", path)
            return True
        return self._stage(step.name) if step.build is None else self._files(step.name, step.build)

    def _write_configs(self) -> None:
        """Copies the stage files with their folders moved to `out`, so that each can be run alone."""
        if self.out == Path(self.recipe.out):
            self.configs = self.recipe.configs
            return
        for source in [*self.recipe.configs.glob("*.yaml"), self.recipe.configs.parent / "base.yaml"]:
            text = source.read_text().replace(self.recipe.out, str(self.out))
            target = self.configs / source.relative_to(self.recipe.configs.parent)
            write_text(target, text)
        self.configs = self.configs / self.recipe.configs.name

    def _files(self, name: str, build: Callable[[Path], object]) -> bool:
        folder = self.out / name
        built = not stage_is_finished(folder)
        if built:
            # A builder replaces only a folder that holds nothing but what it wrote itself.
            (folder / RECEIPT).unlink(missing_ok=True)
            build(folder)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            write_json(folder / RECEIPT, {"outputs": {str(p.relative_to(folder)): file_sha256(p) for p in files}})
        else:
            log.info("%s is there already", name)
        # Other data is another run: every stage after it starts anew.
        self._digest = hashlib.sha256(f"{self._digest} {file_sha256(folder / RECEIPT)}".encode()).hexdigest()
        return built

    def _stage(self, name: str) -> bool:
        config = self.configs / f"{name}.yaml"
        folder = self.out / name
        self._digest = hashlib.sha256(f"{self._digest} {_config_text(config)}".encode()).hexdigest()
        if (folder / DIGEST).is_file() and (folder / DIGEST).read_text() != self._digest:
            log.info("the configuration of %s changed since it was trained: it starts anew", name)
            shutil.rmtree(folder)
        if stage_is_finished(folder):
            log.info("%s is there already", name)
            return False
        write_text(folder / DIGEST, self._digest)
        run(["fit", "--config", str(config), *self.overrides])
        if not stage_is_finished(folder):
            # Its last checkpoint says that it is done, its results are not there or damaged.
            run(["fit", "--config", str(config), "--fresh", *self.overrides])
        return True

    def _add_seconds(self, name: str, seconds: float) -> None:
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 1)
        write_json(self.out / SECONDS, self.seconds)


def stage_is_finished(folder: Path) -> bool:
    """Returns whether a stage has its receipt and every output that the receipt lists, unchanged."""
    outputs = read_json(folder / RECEIPT).get("outputs")
    if not isinstance(outputs, dict):
        return False
    return all((folder / name).is_file() and file_sha256(folder / name) == sha for name, sha in outputs.items())


def _config_text(path: Path) -> str:
    """Returns the text of a stage file and of all files it is layered on."""
    text = path.read_text()
    bases = yaml.safe_load(text).get("base", [])
    return "".join(_config_text(path.parent / base) for base in ([bases] if isinstance(bases, str) else bases)) + text


def _time_left(started: float, done: float, ahead: float) -> str:
    if done == 0:
        return ""
    minutes = (time.monotonic() - started) / done * ahead / 60
    return f"  (about {minutes:.0f} min left)" if minutes >= 1 else "  (less than a minute left)"


def run_recipe(recipe: Recipe, about: str, argv: Sequence[str]) -> Path | None:
    """Runs a recipe as the command line asks.

    Args:
        recipe: The steps.
        about: What the command does, for its help.
        argv: Its options; `--trainer.*` are those of every stage.

    Returns:
        The folder of all runs; None if it stopped before the end.

    Raises:
        UserError: If an option is not known.
    """
    parser = argparse.ArgumentParser(prog=f"python -m moextend_pl {recipe.command}", description=about)
    home = Path(recipe.out)
    parser.add_argument("--out", type=Path, default=home, help=f"folder of all runs (default: {home})")
    parser.add_argument("--skip-full-finetune", action="store_true", help="leave the baselines out")
    parser.add_argument("--until", default="", choices=recipe.essential, help="stop after this step")
    options, overrides = parser.parse_known_args(argv)
    before = ["", *overrides]
    # `--trainer.x 3` is as good as `--trainer.x=3`
    is_value = [word.startswith("--trainer.") and "=" not in word for word in before]
    unknown = [
        word
        for word, follows in zip(overrides, is_value, strict=False)
        if not word.startswith("--trainer.") and (word.startswith("--") or not follows)
    ]
    if unknown:
        raise UserError(
            f"{recipe.command} does not accept {unknown[0]!r}; it takes --out, --skip-full-finetune, --until and "
            "--trainer.*"
        )
    Runner(recipe, options.out, overrides, options.until).run(recipe.baselines if options.skip_full_finetune else ())
    return None if options.until else options.out
