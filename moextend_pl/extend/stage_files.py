"""The stage files of the one command, as a person would write them: to be read, edited and run again.

Sources of the numbers: LLaVA-1.5's scripts (rate of the projector), `configs/mixtral_8x7b` (rate of new experts), and
the quickstart for models as tiny as its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

STAGES = ("1_align", "2_probe", "3_extend")
TINY_WIDTH = 1024
"""Below this width of the language model the quickstart's rate holds."""

LEAST_STEPS, MOST_PROBED = 200, 1000


@dataclass(frozen=True)
class Wish:
    """What is known before the stage files are written.

    Attributes:
        out: Folder of all runs.
        base: Folder of the language model.
        tower: Folder of the vision tower.
        is_saved_tower: Whether a stage wrote the tower; else transformers did.
        train: Shards to learn from.
        val: Shards to measure on.
        samples: Samples of `train`.
        width: Width of the language model.
        batch: Samples of a step.
        epochs: How often the aligning and the extending stage see a sample, at least.
        precision: Of the trainer.
        length: Longest sequence in tokens.
    """

    out: Path
    base: Path
    tower: Path
    is_saved_tower: bool
    train: Path
    val: Path
    samples: int
    width: int
    batch: int
    epochs: float
    precision: str
    length: int

    @property
    def steps(self) -> int:
        """Steps of the aligning and the extending stage."""
        return max(round(self.samples * self.epochs / self.batch), LEAST_STEPS)

    @property
    def rate(self) -> float:
        """Learning rate of new experts."""
        return 2e-3 if self.width < TINY_WIDTH else 2e-5


def stage_files(wish: Wish) -> dict[str, str]:
    """Returns the text of each file by its name."""
    probe = min(max(wish.steps // 4, 50), MOST_PROBED)
    return {
        "model.yaml": _model(wish),
        "1_align.yaml": _align(wish),
        "2_probe.yaml": _probe(wish, probe),
        "3_extend.yaml": _extend(wish),
    }


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def _model(wish: Wish) -> str:
    return f"""\
# Model and data of the three stages, written by `python -m moextend_pl extend`. Edit what you like and run that command
# again: a stage whose file changed starts anew, and so do those after it. One stage alone:
# `python -m moextend_pl fit --config {wish.out}/configs/1_align.yaml`.
base: base.yaml # the package's own: `python -m moextend_pl configs list`
trainer:
  precision: {wish.precision}
data:
  class_path: datamodules.ImageTextShards
  init_args:
    train: {_quoted(wish.train)}
    val: {_quoted(wish.val)}
    batch_size: {wish.batch} # of all devices together; for less memory halve it and set trainer.accumulate_grad_batches
    rows:
      max_length: {wish.length} # longer conversations are cut, never inside a picture
    evaluation:
      samples: 1000
model:
  class_path: moextend_pl.MoExtend
  init_args:
    encoder:
      {"path" if wish.is_saved_tower else "name"}: {_quoted(wish.tower)}
    projector:
      kind: mlp2x_gelu
    language:
      base: {_quoted(wish.base)}
"""


def _stage(wish: Wish, name: str, about: str, steps: int, callbacks: str, rate: float, start: str = "") -> str:
    return f"""\
{about}
base: model.yaml
trainer:
  default_root_dir: {_quoted(wish.out / name)}
  max_steps: {steps}
  val_check_interval: {max(steps // 4, 1)}
  callbacks+:
{callbacks}
model:
  init_args:
{start}    optim:
      lr: {rate:.1e}
      weight_decay: 0.0
      warmup_fraction: 0.03
      schedule: cosine
"""


def _align(wish: Wish) -> str:
    callbacks = """\
    - class_path: callbacks.TrainOnly
      init_args:
        parts: [projector]
    - class_path: callbacks.FrozenGuard
    - class_path: callbacks.SaveDelta
    - class_path: callbacks.StageReceipt
      init_args:
        outputs: [delta.safetensors, manifest.json, frozen.json]"""
    about = "# Stage 1: the projector learns to say in the language model's words what a picture shows."
    return _stage(wish, "1_align", about, wish.steps, callbacks, 2e-3 if wish.width < TINY_WIDTH else 1e-3)


def _probe(wish: Wish, steps: int) -> str:
    callbacks = """\
    - class_path: callbacks.TrainOnly
      init_args:
        parts: [routers]
    - class_path: callbacks.FrozenGuard
    - class_path: callbacks.ExpertExtension
      init_args:
        rule:
          class_path: moextend_pl.ShiftRule
          init_args:
            fraction: 0.5 # of the layers get a new expert
    - class_path: callbacks.StageReceipt
      init_args:
        outputs: [extension_plan.yaml, usage.json, frozen.json]"""
    about = """\
# Stage 2: the routers learn for a short while; the layers whose expert usage shifts most are chosen, and the routers
# are put back as they were."""
    return _stage(wish, "2_probe", about, steps, callbacks, 1e-3, _start(wish))


def _extend(wish: Wish) -> str:
    callbacks = f"""\
    - class_path: callbacks.TrainOnly
      init_args:
        parts: [projector, new_experts, new_routers, calibration]
    - class_path: callbacks.ExpertExtension
      init_args:
        plan: {_quoted(wish.out / "2_probe" / "extension_plan.yaml")}
        init: preserving # the paper: copy
        routing: masked # texts without a picture are answered bit for bit as before; the paper: open
    - class_path: callbacks.FrozenGuard
    - class_path: callbacks.UsageReport
    - class_path: callbacks.SaveDelta
    - class_path: callbacks.StageReceipt
      init_args:
        outputs: [delta.safetensors, manifest.json, frozen.json, usage.json]"""
    about = "# Stage 3: new experts, their router rows, the calibration and the projector learn; all else is frozen."
    return _stage(wish, "3_extend", about, wish.steps, callbacks, wish.rate, _start(wish))


def _start(wish: Wish) -> str:
    return f"    init_from: {_quoted(wish.out / '1_align')}\n"
