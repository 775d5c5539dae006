"""What TensorBoard, W&B and MLflow hold of a run that was stopped and went on, read back from their files."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.ranks import run_rounds
from helpers.stages import write_stage
from helpers.tiny_world import EXPERTS, GROWN, TinyWorld, make_plan

from moextend_pl import cli
from moextend_pl.runs.atomic import read_json
from moextend_pl.runs.metrics_log import last_steps

pytestmark = pytest.mark.slow
STEPS, CHECKPOINT = 6, 4
Values = dict[str, list[tuple[int, float]]]


def of_tensorboard(run: Path) -> tuple[Values, int]:
    """Returns (step, value) of every name, and how many pictures there are."""
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    names = events.Tags()
    values = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names["scalars"]}
    return values, sum(len(events.Images(name)) for name in names["images"])


def of_mlflow(run: Path) -> tuple[Values, int]:
    client = importlib.import_module("mlflow").MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("moextend_pl")
    (only,) = client.search_runs([experiment.experiment_id])
    assert only.info.status == "FINISHED"
    names = [name for name in only.data.metrics if not name.startswith("images/")]
    history = {name: client.get_metric_history(only.info.run_id, name) for name in names}
    pictures = list((run / "mlflow").rglob("*.png"))
    return {name: [(m.step, m.value) for m in each] for name, each in history.items()}, len(pictures)


def of_wandb(run: Path) -> tuple[Values, int]:
    """Reads what was written for a later `wandb sync`: records in LevelDB's format of logs."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    values: Values = {}
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{read_json(run / 'loggers.json')['wandb']}.wandb"}
    for file in files:
        for content in leveldb_records(file.read_bytes()):
            items = record.FromString(content).history.item
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            for name, value in row.items():
                if isinstance(value, int | float) and not name.startswith("_"):
                    values.setdefault(name, []).append((row["trainer/global_step"], value))
    return values, len(list((run / "wandb").glob("offline-run-*/files/media/images/**/*.png")))


def leveldb_records(data: bytes) -> list[bytes]:
    """Returns the records of a log: blocks of 32 KiB, of pieces with checksum, length and kind (whole, first, ...)."""
    found, begun, place = [], b"", 7  # behind the mark and the version
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        begun += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found, begun = [*found, begun], b""
    return found


SERVICES: dict[str, tuple[str, dict[str, object], Callable[[Path], tuple[Values, int]]]] = {
    "TensorBoardRun": ("tensorboard", {}, of_tensorboard),
    "WandbRun": ("wandb", {"offline": True}, of_wandb),
    "MLflowRun": ("mlflow", {}, of_mlflow),
}


def installed() -> list[str]:
    found = [name for name, (module, _, _) in SERVICES.items() if importlib.util.find_spec(module)]
    if not found:
        pytest.skip("nothing of the extra `loggers` is installed")
    return found


def write_watched(world: TinyWorld, folder: Path, services: list[str]) -> Path:
    make_plan().save(folder / "plan.yaml")
    config = write_stage(world, folder / "run", "extend", plan=folder / "plan.yaml", steps=STEPS, every=CHECKPOINT)
    content = yaml.safe_load(config.read_text())
    content["trainer"]["logger"] = [
        {"class_path": f"moextend_pl.{name}", "init_args": SERVICES[name][1]} for name in services
    ]
    usage = {"every_n_steps": 1, "detail": "experts", "pictures_every": 2}
    content["trainer"]["callbacks"].insert(0, {"class_path": "callbacks.UsageLog", "init_args": usage})
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    return config


def assert_whole(run: Path, services: list[str]) -> None:
    """Every step of every value is there once, as `metrics.csv` has it, under its own name."""
    known = last_steps(run)
    for service in services:
        values, pictures = SERVICES[service][2](run)
        assert pictures == STEPS // 2, service
        expert = f"language/layer_{GROWN[0]:02d}/expert_{EXPERTS:02d}/image"
        for name in ("train/loss", "language/entropy", "language/layer_01/dead", expert):
            steps = [step for step, _ in values[name]]
            assert len(set(steps)) == len(steps), (service, name)
        for name in ("train/loss", "language/entropy"):
            assert [step for step, _ in values[name]] == list(range(STEPS)), (service, name)
        assert set(known) - {"step"} <= set(values), service


@pytest.fixture
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.usefixtures("_quiet")
def test_run_that_goes_on_is_one_run_in_which_every_step_stands_once(tiny_world: TinyWorld, tmp_path: Path) -> None:
    services = installed()
    config, run = write_watched(tiny_world, tmp_path, services), tmp_path / "run"
    cli.run(["fit", "--config", str(config)])
    # As after a kill behind step 4: the last steps are taken again.
    (run / "checkpoints" / "last.ckpt").unlink()
    assert [path.name for path in (run / "checkpoints").glob("*.ckpt")] == ["previous.ckpt"]
    assert cli.run(["fit", "--config", str(config)]).trainer.global_step == STEPS
    assert_whole(run, services)
    cli.run(["fit", "--config", str(config), "--fresh", "--trainer.logger=false"])
    assert not {"tensorboard", "wandb", "mlflow.db", "loggers.json"} & {path.name for path in run.iterdir()}


@pytest.mark.usefixtures("_quiet")
def test_two_processes_tell_every_step_once(tiny_world: TinyWorld, tmp_path: Path) -> None:
    services = [name for name in installed() if name != "MLflowRun"]  # whose data base takes half a minute to make
    config = write_watched(tiny_world, tmp_path, services)
    run_rounds([(2, [["fit", "--config", str(config), "--trainer.devices=2", "--trainer.strategy=ddp"]])], tmp_path)
    assert_whole(tmp_path / "run", services)
