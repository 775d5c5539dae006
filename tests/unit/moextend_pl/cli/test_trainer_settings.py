"""What is asked of the trainer: strategies that would train ranks apart, and numbers that are none, are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch.strategies as lightning_strategies
import pytest
from helpers.cli_runs import ALLOW, error_of, fit
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from moextend_pl.cli.stage import MoExtendCLI
from moextend_pl.cli.trainer_settings import STRATEGIES, our_strategy
from moextend_pl.training.sharding.strategy import ShardedStrategy

FAILS_WHEN_BUILT = "--model.fail=init"
WORKING = {name for name, reason in STRATEGIES.items() if not reason}
LIGHTNINGS = "lightning.pytorch.strategies.ModelParallelStrategy"
NOT_BUILT = {"Strategy", "ParallelStrategy", "SingleDeviceXLAStrategy"}  # here the parser itself refuses to name them
LAUNCHED_BY_A_SHELL = ("ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
GIVEN = {"ModelParallelStrategy": lightning_strategies.ModelParallelStrategy(), "ShardedStrategy": ShardedStrategy()}
SHARE_WEIGHTS = ("fsdp2", "hsdp", "expert_parallel", "ModelParallelStrategy", "ShardedStrategy")


class Localised(DDPStrategy):
    """Somebody's own, made from one that works."""


class Apart(lightning_strategies.ModelParallelStrategy):
    """Somebody's own, made from one that does not."""


def test_every_strategy_that_lightning_knows_is_judged() -> None:
    assert set(StrategyRegistry.available_strategies()) <= set(STRATEGIES)
    assert set(lightning_strategies.__all__) <= set(STRATEGIES)
    one, copied = {"auto", "single_device", "SingleDeviceStrategy"}, {*LAUNCHED_BY_A_SHELL, "DDPStrategy"}
    assert one | copied | set(SHARE_WEIGHTS) == WORKING


def test_every_strategy_that_is_accepted_shares_gradients() -> None:
    shares = (DDPStrategy, ShardedStrategy, lightning_strategies.SingleDeviceStrategy)
    for name in WORKING - {"auto"}:  # which becomes one of the others
        if name in StrategyRegistry:
            assert isinstance(StrategyRegistry.get(name), shares), name
        elif name in SHARE_WEIGHTS:
            assert isinstance(our_strategy(GIVEN.get(name, name)), shares), name
        elif name != "single_device":
            assert issubclass(getattr(lightning_strategies, name), shares), name


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - WORKING - NOT_BUILT))
def test_strategy_that_would_not_share_what_is_learned_is_refused_with_another(
    capsys: pytest.CaptureFixture[str], stage: Path, name: str
) -> None:
    given = name if name[0].islower() else f"{{class_path: lightning.pytorch.strategies.{name}}}"
    message = error_of(capsys, ["fit", "--config", str(stage), *ALLOW, f"--trainer.strategy={given}", FAILS_WHEN_BUILT])
    assert message.startswith(f"`trainer.strategy` {name} ")
    assert "Use " in message


@pytest.mark.parametrize("name", [*LAUNCHED_BY_A_SHELL, "{class_path: lightning.pytorch.strategies.DDPStrategy}"])
def test_strategy_that_works_is_built(stage: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(MoExtendCLI, "_run_subcommand", lambda *_: None)
    built = fit(stage, f"--trainer.strategy={name}", "--trainer.devices=2")
    assert isinstance(built.trainer.strategy, DDPStrategy)


@pytest.mark.parametrize(
    ("given", "copies", "share"),
    [
        ("fsdp2", 1, "layers"),
        ("hsdp", "node", "layers"),
        ("expert_parallel", 1, "experts"),
        ("{class_path: lightning.pytorch.strategies.ModelParallelStrategy}", 1, "layers"),
        ("{class_path: moextend_pl.ShardedStrategy, init_args: {copies: 2}}", 2, "layers"),
        ("{class_path: moextend_pl.ShardedStrategy, init_args: {copies: 2, share: experts}}", 2, "experts"),
    ],
)
def test_weights_are_shared_by_our_own_strategy(
    stage: Path, monkeypatch: pytest.MonkeyPatch, given: str, copies: int | str, share: str
) -> None:
    monkeypatch.setattr(MoExtendCLI, "_run_subcommand", lambda *_: None)
    strategy = fit(stage, f"--trainer.strategy={given}", "--trainer.devices=4").trainer.strategy
    assert isinstance(strategy, ShardedStrategy)
    assert (strategy.copies, strategy.share) == (copies, share)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            [f"{{class_path: {LIGHTNINGS}, init_args: {{data_parallel_size: 1, tensor_parallel_size: 2}}}}"],
            "`trainer.strategy` ModelParallelStrategy cuts single products up",
        ),
        (["fsdp2", "--trainer.precision=16-mixed"], "`trainer.strategy` fsdp2 shards no scaler of float16"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_another(
    capsys: pytest.CaptureFixture[str], stage: Path, options: list[str], words: str
) -> None:
    argv = ["fit", "--config", str(stage), *ALLOW, "--trainer.devices=2", f"--trainer.strategy={options[0]}"]
    assert words in error_of(capsys, [*argv, *options[1:]])


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (
            "{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {start_method: spawn}}",
            "`trainer.strategy` ddp_fork starts its processes as copies",
        ),
        ("{class_path: test_trainer_settings.Apart}", "`trainer.strategy` Apart does not share gradients here"),
    ],
)
def test_strategy_is_judged_by_what_it_is_made_from(
    capsys: pytest.CaptureFixture[str], stage: Path, strategy: str, words: str
) -> None:
    allow = ["--allow-class-path", "test_trainer_settings"]
    argv = ["fit", "--config", str(stage), *ALLOW, *allow, f"--trainer.strategy={strategy}", "--trainer.devices=2"]
    assert words in error_of(capsys, argv)


def test_own_strategy_made_from_one_that_works_is_built(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MoExtendCLI, "_run_subcommand", lambda *_: None)
    allow = ("--allow-class-path", "test_trainer_settings")
    built = fit(
        stage, *allow, "--trainer.strategy={class_path: test_trainer_settings.Localised}", "--trainer.devices=2"
    )
    assert type(built.trainer.strategy).__name__ == "Localised"


def test_processes_copied_by_a_notebook_are_refused(
    capsys: pytest.CaptureFixture[str], stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.accelerator_connector._IS_INTERACTIVE", True)
    message = error_of(capsys, ["fit", "--config", str(stage), *ALLOW, "--trainer.devices=2"])
    assert "ddp_fork starts its processes as copies" in message


@pytest.mark.parametrize(
    ("tasks", "per_node", "options", "words"),
    [
        ("4", "4", ["--trainer.devices=1"], "for SLURM_NTASKS=4: each task is one process"),
        ("4", "2", ["--trainer.devices=2", "--trainer.num_nodes=2"], ""),
        ("4", "2", ["--trainer.devices=2"], "for SLURM_NTASKS=4: each task is one process"),
        ("4", "", ["--trainer.devices=4"], "the trainer refuses its settings: You set `--ntasks=4`"),
        ("1", "", ["--trainer.devices=2"], "for SLURM_NTASKS=1: each task is one process"),
        ("1", "", [], ""),
    ],
)
def test_run_has_as_many_processes_as_slurm_has_tasks(
    capsys: pytest.CaptureFixture[str],
    stage: Path,
    monkeypatch: pytest.MonkeyPatch,
    tasks: str,
    per_node: str,
    options: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(MoExtendCLI, "_run_subcommand", lambda *_: None)
    facts: dict[str, Any] = {"NTASKS": tasks, "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "moextend"}
    for name, value in {**facts, **({"NTASKS_PER_NODE": per_node} if per_node else {})}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    argv = ["fit", "--config", str(stage), *ALLOW, *options]
    if words:
        assert words in error_of(capsys, argv)
    else:
        fit(stage, *options)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("trainer.gradient_clip_val=-1", "`trainer.gradient_clip_val` of at least 0, got -1"),
        ("trainer.gradient_clip_val=.nan", "a finite number as `trainer.gradient_clip_val`, got nan"),
        ("trainer.log_every_n_steps=0", "`trainer.log_every_n_steps` above 0, got 0"),
        ("model.lr=.nan", "a finite number as `model.lr`, got nan"),
        ("model.lr=.inf", "a finite number as `model.lr`, got inf"),
        ("trainer.precision=16-mixed", "`trainer.precision` 16-mixed needs a GPU, and would be bf16-mixed here"),
        ("trainer.precision=16", "`trainer.precision` 16 needs a GPU"),
    ],
)
def test_number_that_would_be_taken_without_a_word_is_refused(
    capsys: pytest.CaptureFixture[str], stage: Path, option: str, words: str
) -> None:
    assert words in error_of(capsys, ["fit", "--config", str(stage), *ALLOW, f"--{option}"])


def test_clipping_of_nothing_is_accepted(stage: Path) -> None:
    assert fit(stage, "--trainer.gradient_clip_val=0").trainer.global_step == 3
