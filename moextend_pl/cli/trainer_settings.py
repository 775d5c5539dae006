"""What is asked of the trainer before anything is built: numbers in range, strategies that share gradients."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from moextend_pl.contracts import UserError
from moextend_pl.training.sharding.strategy import A_NODE, EXPERTS, LAYERS, ShardedStrategy

ABOVE_ZERO = ("accumulate_grad_batches", "val_check_interval", "log_every_n_steps")
SEEDS = 2**32  # numpy takes no others
HALF_BY_AUTOCAST = ("16-mixed", "16", 16)
SHARDED: dict[str, dict[str, Any]] = {"fsdp2": {}, "hsdp": {"copies": A_NODE}, "expert_parallel": {"share": EXPERTS}}
"""Short names of ShardedStrategy -> its arguments."""
SHARING = (*SHARDED, "ModelParallelStrategy", "ShardedStrategy")

_USE_DDP = "Use `ddp`"
_USE_FSDP2 = "Use `fsdp2`, which shards the layers of the language model, or `ddp`"
_COPIED = f"starts its processes as copies of this one, to which no result comes back. {_USE_DDP} from a shell."
_SHARDED = f"cuts up weights of which most are frozen, and has not been made to fit them. {_USE_FSDP2}."
_TENSORS = (
    "cuts single products up where `tensor_parallel_size` is above 1, for which nothing here has been made. Leave both "
    "sizes out to share weights over all processes; Use `hsdp` for a copy on each node."
)
_UNSHARED = f"does not share gradients here: every process would train a model of its own. {_USE_FSDP2}."
_XLA = "needs a TPU, for which nothing here has been made. Use a CPU or GPUs, with `auto` or `ddp`."
_UNKNOWN = f"is not known to share gradients. {_USE_DDP}, or a class of your own that is made from DDPStrategy."

STRATEGIES: dict[str, str] = {
    **dict.fromkeys(("auto", "single_device", "SingleDeviceStrategy"), ""),
    **dict.fromkeys(("ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "DDPStrategy"), ""),
    **{
        f"ddp_{start}{unused}": _COPIED
        for start in ("spawn", "fork", "notebook")
        for unused in ("", "_find_unused_parameters_false", "_find_unused_parameters_true")
    },
    **dict.fromkeys(("fsdp", "fsdp_cpu_offload", "FSDPStrategy"), _SHARDED),
    **dict.fromkeys(("deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload"), _SHARDED),
    **dict.fromkeys(("deepspeed_stage_3", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme"), _SHARDED),
    "DeepSpeedStrategy": _SHARDED,
    **dict.fromkeys(SHARING, ""),
    **dict.fromkeys(("xla", "xla_debug", "single_xla", "single_tpu", "XLAStrategy", "SingleDeviceXLAStrategy"), _XLA),
    **dict.fromkeys(("Strategy", "ParallelStrategy"), _UNKNOWN),
}
"""Every name and class that Lightning knows a strategy by, and our own -> why it is refused; empty if it works."""


def check_settings(config: dict[str, Any]) -> None:
    """Refuses settings that Lightning notices only when it uses them, or never.

    Args:
        config: Of one command, as plain data.

    Raises:
        UserError: If a number is none or out of its range, or the strategy is known not to work.
    """
    seed = config.get("seed_everything")
    if type(seed) is int and not 0 <= seed < SEEDS:
        raise UserError(f"expected `seed_everything` from 0 to {SEEDS - 1}, got {seed}.")
    for key, number in _numbers(config):
        if not math.isfinite(number):
            raise UserError(f"expected a finite number as `{key}`, got {number}. Correct it, or leave it out.")
    trainer = config.get("trainer") or {}
    for name in ABOVE_ZERO:
        value = trainer.get(name)
        if isinstance(value, int | float) and value <= 0:
            raise UserError(f"expected `trainer.{name}` above 0, got {value}. Leave it out for Lightning's default.")
    clip = trainer.get("gradient_clip_val")
    if isinstance(clip, int | float) and clip < 0:
        raise UserError(f"expected `trainer.gradient_clip_val` of at least 0, got {clip}. 0 clips nothing.")
    strategy = trainer.get("strategy") or "auto"
    name = str(strategy.get("class_path") if isinstance(strategy, dict) else strategy).rpartition(".")[2]
    _refuse(name)
    if name in SHARING and trainer.get("precision") in HALF_BY_AUTOCAST:
        raise UserError(
            f"`trainer.strategy` {name} shards no scaler of float16, which `trainer.precision` "
            f"{trainer['precision']} needs. Set `bf16-mixed` or `32-true`, or use `ddp`."
        )


def sharing_of(trainer: dict[str, Any]) -> tuple[str, int] | None:
    """Returns what processes share by a trainer's settings, `layers` or `experts`, and in how many copies.

    Args:
        trainer: Of a config, as plain data.

    Returns:
        None where each process holds everything.
    """
    given: Any = trainer.get("strategy")
    given = given if isinstance(given, dict) else {"class_path": str(given)}
    name = given["class_path"].rpartition(".")[2]
    if name not in SHARING:
        return None
    options = {"copies": 1, "share": LAYERS, **SHARDED.get(name, {}), **(given.get("init_args") or {})}
    return options["share"], int(trainer.get("num_nodes") or 1) if options["copies"] == A_NODE else int(
        options["copies"]
    )


def our_strategy(given: Any) -> Any:
    """Returns what stands for a strategy: short names and Lightning's own class for FSDP2 become ShardedStrategy.

    Args:
        given: As the trainer would take it; anything else is left as it is.

    Raises:
        UserError: If Lightning's class is asked for what is not FSDP2 over all processes.
    """
    if isinstance(given, str) and given in SHARDED:
        return ShardedStrategy(**SHARDED[given])
    if type(given) is not ModelParallelStrategy:
        return given
    if given._tensor_parallel_size not in ("auto", 1):
        raise UserError(f"`trainer.strategy` ModelParallelStrategy {_TENSORS}")
    return ShardedStrategy(process_group_backend=given.process_group_backend, timeout=given._timeout)


def check_trainer(trainer: Trainer, precision: str | int | None) -> None:
    """Refuses a trainer that would train something else than it was asked to.

    Args:
        trainer: As it was built.
        precision: As it was asked for.

    Raises:
        UserError: If its strategy does not share gradients, its processes are not those that SLURM started, or it has
            exchanged the precision.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy) and not isinstance(trainer.strategy, ShardedStrategy):
        raise UserError(f"`trainer.strategy` {type(trainer.strategy).__name__} {_UNSHARED}")
    # What is made from a class of the table is judged as that class.
    _refuse(next(kind.__name__ for kind in type(trainer.strategy).__mro__ if kind.__name__ in STRATEGIES))
    if isinstance(trainer.strategy, DDPStrategy) and trainer.strategy._start_method != "popen":
        _refuse("ddp_fork")  # asked for by an argument, or chosen by Lightning in a notebook
    tasks, processes = os.environ.get("SLURM_NTASKS"), trainer.num_devices * trainer.num_nodes
    if tasks and SLURMEnvironment.detect() and int(tasks) != processes:
        raise UserError(
            f"expected as many processes as SLURM has tasks, got {processes} (`trainer.devices` {trainer.num_devices} "
            f"x `trainer.num_nodes` {trainer.num_nodes}) for SLURM_NTASKS={tasks}: each task is one process. Set both "
            "to what the job was given, or ask for other `--ntasks`."
        )
    if precision in HALF_BY_AUTOCAST and trainer.precision != "16-mixed":
        raise UserError(
            f"`trainer.precision` {precision} needs a GPU, and would be {trainer.precision} here. Set `bf16-mixed` or "
            "`32-true`."
        )


def _refuse(name: str) -> None:
    """Refuses a strategy by its name or class; a name that Lightning does not know either is left to it."""
    if reason := STRATEGIES.get(name, ""):
        raise UserError(f"`trainer.strategy` {name} {reason}")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yields (dotted key, number) of every fractional number in plain data."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, key if name in ("init_args", "dict_kwargs") else f"{key}.{name}".strip("."))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item, key)
