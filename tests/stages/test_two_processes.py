"""Every stage on two processes takes the same steps as on one."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers.ranks import Round, run_rounds
from helpers.stages import PARTS, end, launched_by, metrics, start, wait_for_ends, write_stage
from helpers.tiny_world import TinyWorld, make_plan, perturb
from safetensors.torch import load_file

from moextend_pl import cli
from moextend_pl.contracts import ExtensionPlan, TrainPlan, UpcycleSpec
from moextend_pl.models.delta import save_delta

pytestmark = pytest.mark.slow
HELPERS = Path(__file__).parents[1] / "helpers"
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
ALLOW = ("--allow-class-path", "poison")
# case -> ranks whose loss is not finite
POISONED = {"rank 0": [0], "rank 1": [1], "both": [0, 1]}


def has_image(world: TinyWorld, steps: int) -> list[list[bool]]:
    """Tells for the first batches of `mixed` which half of each has an image."""
    model = world.unbuilt()
    data = world.datamodule("mixed", spec=model.sample_spec())
    data.setup("fit")
    batches = iter(data.train_dataloader())
    ids = [next(batches)["input_ids"] == model.language.image_token_id for _ in range(steps)]
    return [[bool(half.any()) for half in batch.chunk(2)] for batch in ids]


def save_start(world: TinyWorld, run: Path, stage: str) -> Path | None:
    """Saves a run with new weights off their start, where a new expert ties with its source.

    Which of two equal experts wins is decided by rounding, which differs with the number of tokens.
    """
    if stage not in ("extend", "instruction"):
        return None
    if stage == "instruction":
        spec = UpcycleSpec(experts=4, top_k=2)
        model = world.cumo(encoder=spec, projector=spec, language=spec)
        model.train_plan = TrainPlan(tuple(PARTS[stage]))
        model.configure_model()
    else:
        model = world.model(make_plan(sources=(1, 2)), PARTS[stage])
    perturb([p for name in PARTS[stage] for p in model.parts()[name]], size=0.1)
    save_delta(model, run)
    return run


def test_tiny_data_has_batches_of_which_one_rank_sees_no_image(tiny_world: TinyWorld) -> None:
    halves = has_image(tiny_world, 8)
    assert [True, False] in halves or [False, True] in halves
    assert [True, True] in halves


def assert_same_losses(folder: Path, rel: float) -> None:
    expected, got = metrics(folder / "one"), metrics(folder / "two")
    assert list(got) == list(expected) == list(range(8))
    for step, values in expected.items():
        assert got[step] == pytest.approx(values, rel=rel, nan_ok=True), f"step {step}"


def poisoned(world: TinyWorld, run: Path, steps: list[int], **options: object) -> Path:
    config = write_stage(world, run, "align", steps=8)
    content = yaml.safe_load(config.read_text())
    poison = {"class_path": "poison.Poison", "init_args": {"steps": steps, "place": "projector", **options}}
    content["trainer"]["callbacks"].append(poison)
    content["data"]["init_args"]["train"] = world.data("vqa")  # a picture in every batch of every rank
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    return config


# stage -> its shard set
ALONE = {"vision": "vqa", "language": "text"}
WHOLE = ("align", "probe", "extend", "instruction")


def write_pair(world: TinyWorld, folder: Path, stage: str) -> list[str]:
    """Writes the configs of a stage on one process and on two."""
    plan = make_plan(sources=(1, 2))
    plan.save(folder / "plan.yaml")
    options = {"plan": folder / "plan.yaml", "init_from": save_start(world, folder / "start", stage)}
    if stage in ALONE:
        options = {"train": ALONE[stage], "val": world.data(ALONE[stage], "test")}
    return [str(write_stage(world, folder / run, stage, **options)) for run in ("one", "two")]


@pytest.fixture(scope="module")
def pairs(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each stage, which was run on one process and on two, and the logs of the two by round."""
    root = tmp_path_factory.mktemp("pairs")
    rounds: list[Round] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HELPERS))
        patch.syspath_prepend(str(HELPERS))
        for stage in (*ALONE, *WHOLE):
            (root / stage).mkdir()
            one, two = write_pair(tiny_world, root / stage, stage)
            cli.run(["fit", "--config", one])
            rounds.append((2, [["fit", "--config", two, *TWO]]))
        for name, ranks in POISONED.items():
            cli.run(["fit", "--config", str(poisoned(tiny_world, root / name / "one", [3, 5])), *ALLOW])
            two = str(poisoned(tiny_world, root / name / "two", [3, 5], ranks=ranks))
            rounds.append((2, [["fit", "--config", two, *TWO, *ALLOW]]))
        run_rounds(rounds, root)
    return root


@pytest.mark.parametrize("stage", ALONE)
def test_losses_of_a_part_alone_are_the_same_on_two_processes(pairs: Path, stage: str) -> None:
    assert_same_losses(pairs / stage, rel=1e-3)


@pytest.mark.parametrize("stage", WHOLE)
def test_losses_of_two_processes_are_those_of_one(pairs: Path, stage: str) -> None:
    folder = pairs / stage
    assert_same_losses(folder, rel=1e-4)
    if stage == "probe":
        plans = [ExtensionPlan.load(folder / run / "extension_plan.yaml") for run in ("one", "two")]
        assert plans[0].layers == plans[1].layers
        assert plans[0].report["scores"] == pytest.approx(plans[1].report["scores"], abs=1e-6)
    else:
        deltas = [load_file(folder / run / "delta.safetensors") for run in ("one", "two")]
        for name, value in deltas[0].items():
            if name.endswith("attn.qkv.bias"):
                # A bias of keys moves no attention weight: its gradient is rounding, which AdamW makes large.
                continue
            # AdamW divides each gradient by its own size: one number whose gradient is rounding may go astray (2e-4 was
            # seen), a tensor may not. Eight steps move its numbers by 2e-2.
            difference = (deltas[1][name] - value).float()
            assert difference.square().mean().sqrt() < 1e-4, name


@pytest.mark.parametrize("name", POISONED)
def test_both_processes_skip_the_step_in_which_one_of_them_has_no_numbers(pairs: Path, name: str) -> None:
    # Losses of other steps are those of one process, so that both left out the same steps and no others.
    assert_same_losses(pairs / name, rel=1e-4)
    assert [step for step, (loss, *_) in metrics(pairs / name / "two").items() if math.isnan(loss)] == [3, 5]
    number = len(ALONE) + len(WHOLE) + list(POISONED).index(name)
    log = "".join((pairs / f"rank{rank}_of_round{number}.log").read_text() for rank in (0, 1))
    assert log.count("step 3: the loss is not finite") == len(POISONED[name])
    assert log.count("step 3: the loss of another rank is not finite") == 2 - len(POISONED[name])


def test_both_processes_end_when_one_of_them_has_no_numbers_again_and_again(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    config = poisoned(tiny_world, tmp_path / "run", [2, 3, 4, 5], ranks=[1])
    process = start(config, *TWO, *ALLOW)
    try:
        assert process.wait(120) == 2
    finally:
        if process.poll() is None:
            end(process)
    log = config.with_suffix(".log").read_text()
    assert "Traceback" not in log
    assert log.count("got 3 steps in a row without; step 4: ") == 2
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert not (tmp_path / "run" / "stage.json").exists()


def test_processes_that_do_not_share_the_run_directory_end_before_weights_are_read(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.run(["fit", "--config", str(write_stage(tiny_world, tmp_path / "node0", "align", steps=4))])
    configs = [write_stage(tiny_world, tmp_path / f"node{rank}", "align", steps=8) for rank in (0, 1)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank, config in enumerate(configs):  # as a scheduler starts them
        for name, value in {"MASTER_PORT": port, "NODE_RANK": 0, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        ranks.append(start(config, *TWO))
    try:
        assert [process.wait(120) for process in ranks] == [2, 2]
    finally:
        for process in ranks:
            if process.poll() is None:
                end(process)
    for config in configs:
        log = config.with_suffix(".log").read_text()
        assert "got the checkpoint of step 4 on rank 0 and no checkpoint on rank 1" in log
        assert "Traceback" not in log


def has_child(process: subprocess.Popen, _: Path) -> bool:
    return bool(launched_by(process))


def has_trained(_: subprocess.Popen, run: Path) -> bool:
    log = run / "metrics.csv"
    return log.exists() and log.read_text().count("\n") > 5


@pytest.mark.parametrize("moment", [has_child, has_trained], ids=["at the start", "in training"])
@pytest.mark.parametrize("rank", [0, 1])
def test_row_10_both_processes_end_when_one_of_them_is_told_to(
    tiny_world: TinyWorld, tmp_path: Path, rank: int, moment: Callable[[subprocess.Popen, Path], bool]
) -> None:
    config = write_stage(tiny_world, tmp_path / "run", "align", steps=100_000, every=100_000)
    process = start(config, *TWO)
    try:
        limit = time.monotonic() + 120
        while not moment(process, tmp_path / "run"):
            assert process.poll() is None, config.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() < limit
            time.sleep(0.05)
        ranks = [process.pid, *launched_by(process)]
        if moment is has_child:
            time.sleep(1)  # the child is an interpreter by now, and hears
        os.kill(ranks[rank], signal.SIGTERM)
        assert process.wait(60) == 75
        wait_for_ends(ranks[1:], 30)
    finally:
        if process.poll() is None:
            end(process)
    text = config.with_suffix(".log").read_text()
    assert text.count("the same command continues where it stopped") == 2
    assert "Traceback" not in text
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert last.exists() == (moment is has_trained)
    if last.exists():
        assert torch.load(last, weights_only=True)["global_step"] == max(metrics(tmp_path / "run")) + 1


@pytest.mark.parametrize("loader", ["length", "stream"])
def test_row_20_ranks_with_uneven_loaders_take_equal_steps(tmp_path: Path, loader: str) -> None:
    script = HELPERS / "uneven_ranks.py"
    environment = {**os.environ, "PYTHONPATH": str(HELPERS.parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path), loader], env=environment, timeout=120, check=True)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["12", "12"]


def worker_of(pid: int) -> int:
    """Returns the data worker of a rank: forked, so that it has the same command."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(child) for child in children if b"moextend_pl" in Path(f"/proc/{child}/cmdline").read_bytes())


@pytest.mark.parametrize("stopped", ["rank 0", "rank 1", "a worker of rank 1"])
def test_row_14_all_processes_end_when_one_stands_still(tiny_world: TinyWorld, tmp_path: Path, stopped: str) -> None:
    timeout, config = 15, write_stage(tiny_world, tmp_path / "run", "align", steps=100_000, every=5)
    content = yaml.safe_load(config.read_text())
    dog = {"class_path": "moextend_pl.Watchdog", "init_args": {"timeout": timeout}}
    content["trainer"]["callbacks"].append(dog)
    content["data"]["init_args"]["reading"] = {"num_workers": 1}
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    process, victim = start(config, *TWO), 0
    try:
        limit = time.monotonic() + 120
        while not has_trained(process, tmp_path / "run"):
            assert process.poll() is None, config.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() < limit
            time.sleep(0.05)
        ranks = [process.pid, *launched_by(process)]
        victim = {"rank 0": ranks[0], "rank 1": ranks[1]}.get(stopped) or worker_of(ranks[1])
        os.kill(victim, signal.SIGSTOP)
        assert process.wait(timeout + 20) in (75, -signal.SIGKILL)
        wait_for_ends(ranks[1:], 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            if victim:
                os.kill(victim, signal.SIGCONT)  # harmless later
        if process.poll() is None:
            end(process)
    log = config.with_suffix(".log").read_text()
    who = {"rank 0": "rank 1", "rank 1": "rank 0"}.get(stopped, "rank 1")
    doing = "(?:waited for the next batch after|wrote a checkpoint of)" if "worker" in stopped else "was in"
    found = re.search(rf"{who} stands still: for {timeout} s it {doing} step \d+; its last samples: \w\d+.*", log)
    assert found, log[-2000:]
    behind, silent = rf"The others wait for rank 1 \(it {doing}", rf"No sign of life from {stopped} \(it"
    assert re.search(behind if "worker" in stopped else silent, found[0]), found[0]
    assert not list((tmp_path / "run").rglob("*.new"))
    # A data worker whose rank is gone may say so from the thread in which multiprocessing shares tensors.
    assert log.count("Traceback") == log.count(", in _serve")
