"""`python -m moextend_pl quickstart`: the whole method on real pictures, from nothing, in minutes.

Every step leaves files and a receipt. A step whose receipt and outputs are valid is skipped; one that
was interrupted goes on where it stopped; one whose configuration changed starts anew, and so do all
steps after it.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from moextend_pl.cli.commands import run
from moextend_pl.cli.recipes import HOME
from moextend_pl.contracts import UserError
from moextend_pl.quickstart import report
from moextend_pl.quickstart.next_steps import next_commands
from moextend_pl.runs.atomic import read_json, write_json, write_text
from moextend_pl.runs.fingerprints import file_sha256

log = logging.getLogger(__name__)

CONFIGS = HOME / "easy_vqa"
DEFAULT_OUT = "runs/quickstart"
RECEIPT, DIGEST, SECONDS = "stage.json", "config.sha256", "seconds.json"


@dataclass(frozen=True)
class Step:
    """One step of the quickstart.

    Attributes:
        name: Name of the step, and of its folder.
        purpose: What a person sees while it runs.
        share: Its usual share of the whole time, for the time left.
    """

    name: str
    purpose: str
    share: float


STEPS = (
    Step("data", "shards from easy-VQA: captions, questions about pictures, questions about text", 0.01),
    Step("0_vision", "a tiny vision tower learns to match pictures and captions", 0.06),
    Step("0_language", "a tiny mixture-of-experts model learns to answer questions about text", 0.20),
    Step("1_align", "the projector learns to put pictures into the model's words", 0.04),
    Step("2_probe", "the routers learn for a moment; the layers that shift most are chosen", 0.02),
    Step("3_extend", "new experts learn to answer questions about pictures", 0.25),
    Step("report", "the extended model answers the official test split", 0.11),
    Step("full_finetune", "the baseline: the whole language model learns instead", 0.26),
    Step("report_full", "the baseline answers the same questions", 0.05),
)


class Quickstart:
    """Runs the steps in order inside one folder.

    Args:
        out: Folder of all runs.
        overrides: Further options given to every `fit`, for example `--trainer.max_steps=5`.
        until: Name of the last step; all if empty.
    """

    def __init__(self, out: Path, overrides: Sequence[str] = (), until: str = "") -> None:
        self.out, self.overrides, self.until = out, list(overrides), until
        self.configs = out / "configs"
        self.seconds: dict[str, float] = {}
        self._digest = hashlib.sha256(" ".join(self.overrides).encode()).hexdigest()

    def run(self, with_full_finetune: bool = True) -> Path:
        """Runs or skips every step, those of the baseline only if asked, and returns the report."""
        self._write_configs()
        path = self.out / SECONDS
        self.seconds = {name: float(value) for name, value in read_json(path).items()}
        actions: dict[str, Callable[[], bool]] = {
            "data": self._data,
            "report": self._report,
            "report_full": self._report,
        }
        steps = [step for step in STEPS if with_full_finetune or step.name not in ("full_finetune", "report_full")]
        names = [step.name for step in steps]
        steps = steps[: names.index(self.until) + 1] if self.until else steps
        started, done = time.monotonic(), 0.0
        for number, step in enumerate(steps, start=1):
            left = _time_left(started, done, sum(s.share for s in steps[number - 1 :]))
            log.info("[%d/%d] %s: %s%s", number, len(steps), step.name, step.purpose, left)
            begin = time.monotonic()
            action = actions.get(step.name)
            if action() if action else self._stage(step.name):
                done += step.share
                self._add_seconds(step.name, time.monotonic() - begin)
        return self.out / report.REPORT

    def _write_configs(self) -> None:
        """Copies the stage files with their folders moved to `out`, so that each can be run alone."""
        if self.out == Path(DEFAULT_OUT):
            self.configs = CONFIGS
            return
        for source in [*CONFIGS.glob("*.yaml"), CONFIGS.parent / "base.yaml"]:
            text = source.read_text().replace(DEFAULT_OUT, str(self.out))
            target = self.configs / source.relative_to(CONFIGS.parent)
            write_text(target, text)
        self.configs = self.configs / CONFIGS.name

    def _data(self) -> bool:
        folder = self.out / "data"
        built = not stage_is_finished(folder)
        if built:
            # The builder replaces only a folder that holds nothing but what it wrote itself.
            (folder / RECEIPT).unlink(missing_ok=True)
            run(["shards", "build", "easy-vqa", "--out", str(folder)])
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            write_json(folder / RECEIPT, {"outputs": {str(p.relative_to(folder)): file_sha256(p) for p in files}})
        else:
            log.info("data is there already")
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

    def _report(self) -> bool:
        report.write(self.out, self.configs, self.seconds)
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


def main(argv: Sequence[str]) -> int:
    """Runs the quickstart."""
    parser = argparse.ArgumentParser(
        prog="python -m moextend_pl quickstart", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, default=Path(DEFAULT_OUT), help=f"folder of all runs (default: {DEFAULT_OUT})"
    )
    parser.add_argument("--skip-full-finetune", action="store_true", help="leave the baseline out")
    parser.add_argument("--until", default="", choices=[step.name for step in STEPS[:7]], help="stop after this step")
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
            f"quickstart does not accept {unknown[0]!r}; it takes --out, --skip-full-finetune, --until and --trainer.*"
        )
    path = Quickstart(options.out, overrides, options.until).run(not options.skip_full_finetune)
    if not options.until:
        log.info("the report is in %s; what you can do now:", path)
        for purpose, line in next_commands(options.out):
            log.info("  # %s\n    %s", purpose, line)
    return 0
