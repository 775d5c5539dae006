"""Stages of the tiny world as config files and as processes of their own."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from helpers.tiny_world import TinyWorld

ROOT = Path(__file__).parents[2]
PARTS = {
    "align": ["projector"],
    "probe": ["routers"],
    "extend": ["projector", "new_experts", "new_routers", "calibration"],
    "instruction": ["encoder", "projector", "language", "routers"],
    "vision": ["encoder", "heads"],
    "language": ["language", "routers"],
}
OUTPUTS = {
    "align": ["delta.safetensors", "manifest.json", "frozen.json"],
    "probe": ["extension_plan.yaml", "usage.json", "frozen.json"],
    "extend": ["delta.safetensors", "manifest.json", "frozen.json"],
    "instruction": ["delta.safetensors", "manifest.json", "frozen.json"],
}


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    """Returns a callback of this project as a config names it."""
    return {"class_path": f"callbacks.{name}", "init_args": arguments}


def write_stage(
    world: TinyWorld, run: Path, stage: str, *, init_from: Path | None = None, plan: Path | None = None, **changes: Any
) -> Path:
    """Writes the config of a stage of the tiny world, layered on `configs/base.yaml`.

    Args:
        world: The tiny world.
        run: Run directory.
        stage: `align`, `probe` or `extend`; `instruction`, CuMo's third; or `vision` or `language`, which train
            one part alone.
        init_from: Run directory of an earlier stage.
        plan: Plan file of an extend stage.
        changes: `steps`, `every` (steps between checkpoints), `train` (shard set) and `batch_size`.

    Returns:
        The file.
    """
    settings = {"steps": 8, "every": 2, "train": "mixed", "batch_size": 4, "val": world.data("vqa", "test"), **changes}
    extension = {
        "probe": [callback("ExpertExtension", rule={"class_path": "moextend_pl.moe.selection.ShiftRule"})],
        "extend": [callback("ExpertExtension", plan=str(plan), init="copy", routing="masked")],
    }.get(stage, [])
    save = [callback("SaveDelta")] if stage in ("align", "extend", "instruction") else []
    config = {
        "base": str(ROOT / "configs" / "base.yaml"),
        "trainer": {
            "default_root_dir": str(run),
            "accelerator": "cpu",
            "max_steps": settings["steps"],
            "val_check_interval": settings["steps"],
            "limit_val_batches": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": [
                callback("StageCheckpoint", every_n_steps=settings["every"]),
                callback("TrainOnly", parts=PARTS[stage]),
                *extension,
                callback("FrozenGuard"),
                *save,
                callback("StageReceipt", outputs=OUTPUTS.get(stage, ["frozen.json"])),
            ],
        },
        "model": model_section(world, stage, init_from),
        "data": {
            "class_path": "datamodules.ImageTextShards",
            "init_args": {
                "train": world.data(settings["train"]),
                "val": settings["val"],
                "batch_size": settings["batch_size"],
                "rows": {"turns": "single"},
            },
        },
    }
    path = run.parent / f"{run.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def model_section(world: TinyWorld, stage: str, init_from: Path | None) -> dict[str, Any]:
    """Returns what a stage's config says about its model."""
    language = {"base": str(world.base), "router_losses": {"balance": 0.1}}
    whole = {
        "encoder": {"path": str(world.encoder)},
        "projector": {"kind": "mlp2x_gelu"},
        "language": language,
        "init_from": None if init_from is None else str(init_from),
    }
    upcycle = {"experts": 4, "top_k": 2}
    if stage == "instruction":
        whole["encoder"] = {"path": str(world.vit), "features": {"scales": [1, 2]}, "upcycle": upcycle}
        whole["projector"] = {"kind": "mlp2x_gelu", "upcycle": {**upcycle, "counting": "paper"}}
        whole["language"] = {"base": str(world.dense), "upcycle": upcycle}
    alone = {
        "vision": ("VisionEncoder", {"path": str(world.encoder), "tokenizer": str(world.base), "embedding_dim": 8}),
        "language": ("MoELanguageModel", language),
    }
    name, arguments = alone.get(stage, ("MoExtend", whole))
    return {"class_path": f"moextend_pl.{name}", "init_args": {**arguments, "optim": {"lr": 0.01}}}


def start(config: Path, *more: str) -> subprocess.Popen[str]:
    """Starts `python -m moextend_pl fit` on a config, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "moextend_pl", "fit", "--config", str(config), *more]
    log = config.with_suffix(".log").open("a")
    # A session of its own, so that the processes it starts can be ended with it. Shells start what runs in the
    # background deaf to SIGINT, and its children inherit that.
    return subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True, preexec_fn=_hear_interrupts
    )


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(config: Path, *more: str, timeout: float = 300) -> None:
    """Runs a stage to its end.

    Raises:
        AssertionError: If it fails; with the end of its log.
    """
    process = start(config, *more)
    try:
        code = process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        end(process)
        code = -1
    assert code == 0, config.with_suffix(".log").read_text()[-3000:]


def end(process: subprocess.Popen[str]) -> None:
    """Kills a process that `start` started, with those it started itself."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def launched_by(process: subprocess.Popen[str]) -> list[int]:
    """Returns the processes of the other ranks, which the first one has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"moextend_pl" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_ends(pids: Sequence[int], seconds: float) -> None:
    """Waits for the ends of processes that this one did not start.

    Raises:
        AssertionError: If one is still there then.
    """
    limit = time.monotonic() + seconds
    while left := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < limit, f"still there: {left}"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_when(config: Path, ready: Callable[[], bool], *more: str, timeout: float = 240) -> None:
    """Starts a stage and kills it (SIGKILL) as soon as something is true.

    Raises:
        AssertionError: If the stage ends before that.
    """
    process = start(config, *more)
    try:
        limit = time.monotonic() + timeout
        while not ready():
            assert process.poll() is None, "ended too early:\n" + config.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() < limit, "nothing happened"
            time.sleep(0.01)
    finally:
        end(process)


def metrics(run: Path, names: Sequence[str] = ("train/loss", "train/balance")) -> dict[int, list[float]]:
    """Returns columns of `metrics.csv` by step; a step that stands twice counts as its last row says."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row["train/loss"]}
    return {step: [float(row[name]) for name in names if name in row] for step, row in rows.items()}
