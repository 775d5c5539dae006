"""What a run does in a step and how long it takes, from its config and the options of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moextend_pl.cli.trainer_settings import sharing_of
from moextend_pl.contracts import UserError
from moextend_pl.models.feature_cache import ENCODE_TOGETHER
from moextend_pl.plan.cost import RunShape
from moextend_pl.plan.facts import ModelShape
from moextend_pl.plan.operations import operations
from moextend_pl.training.sharding.strategy import EXPERTS


@dataclass(frozen=True)
class Wishes:
    """What the command line says beside the config; None where the config decides.

    Attributes:
        gpus: Number of GPUs; the global batch stays.
        length: Tokens of a padded sequence.
        mean_length: Tokens of a mean sequence.
    """

    gpus: int | None = None
    length: int | None = None
    mean_length: float | None = None


@dataclass(frozen=True)
class Time:
    """Duration and cost of a run.

    Attributes:
        tokens_per_second: Of one GPU.
        hours: From the first step to the last, without validation.
        cost: Of all GPUs, in the unit of the price; None without a price.
    """

    tokens_per_second: float
    hours: float
    cost: float | None


def configured_gpus(trainer: dict[str, Any]) -> int:
    """Returns the number of processes that a trainer's settings start; one where they leave it open."""
    devices, nodes = trainer.get("devices"), int(trainer.get("num_nodes") or 1)
    if isinstance(devices, str) and "," in devices:  # numbers of cards, as Lightning reads them
        devices = [number for number in devices.split(",") if number.strip()]
    if isinstance(devices, list):
        return max(len(devices), 1) * nodes
    count = int(str(devices)) if str(devices).isdigit() else 1
    return max(count, 1) * nodes


def run_shape(config: dict[str, Any], wishes: Wishes, shape: ModelShape, **more: Any) -> RunShape:
    """Reads what a run does in one step; `more` are further fields of `RunShape`.

    Raises:
        UserError: If the config does not say it, or the batch does not divide.
    """
    trainer, data = config["trainer"], (config.get("data") or {}).get("init_args") or {}
    batch, steps = data.get("batch_size"), trainer.get("max_steps") or 0
    length = wishes.length or (data.get("rows") or {}).get("max_length")
    if not isinstance(batch, int) or batch < 1:
        raise UserError(f"Expected `data.batch_size`, sequences of a batch over all GPUs, got {batch!r}.")
    if not isinstance(length, int) or length < 1:
        raise UserError(f"Expected `data.rows.max_length` or `--length`, tokens of a padded sequence, got {length!r}.")
    if steps < 1:
        raise UserError(f"Expected `trainer.max_steps` > 0, got {steps}. Set it in the stage file.")
    mean_length = wishes.mean_length or float(length)
    if mean_length > length:
        raise UserError(
            f"Expected `--mean-length` within the {length} tokens of a padded sequence, got {mean_length:g}."
        )
    ranks = configured_gpus(trainer)
    gpus, accumulate = wishes.gpus or ranks, int(trainer.get("accumulate_grad_batches") or 1)
    if batch % ranks or (accumulate * batch) % gpus:
        raise UserError(
            f"Batches of {batch} sequences on {ranks} GPUs, {accumulate} of them a step, cannot be shared by "
            f"{gpus} GPUs. Change `data.batch_size` or `trainer.accumulate_grad_batches`."
        )
    image = round(shape.placeholders(shape.tiles))
    if image >= length:
        raise UserError(
            f"Expected sequences longer than the {image} tokens of an image, got {length}. Change "
            "`data.rows.max_length` or `--length`."
        )
    # More GPUs take fewer micro-batches each, and smaller ones only where there are not enough for all.
    share = accumulate * batch // gpus
    micro_batch = next(size for size in range(batch // ranks, 0, -1) if share % size == 0)
    return RunShape(
        gpus=gpus,
        micro_batch=micro_batch,
        accumulate=share // micro_batch,
        steps=steps,
        length=length,
        mean_length=mean_length,
        images=float(shape.tiles) if shape.tower is not None else 0.0,  # of a picture of the most tiles
        **{"encoded_together": ENCODE_TOGETHER, **_sharing(trainer, gpus), **more},
    )


def _sharing(trainer: dict[str, Any], gpus: int) -> dict[str, Any]:
    """Returns the fields of `RunShape` that say what GPUs share; none where each holds everything."""
    sharing = sharing_of(trainer)
    if sharing is None:
        return {}
    share, copies = sharing
    if copies < 1 or gpus % copies or (copies > 1 and copies == gpus):
        raise UserError(f"Expected GPUs that divide into {copies} copies of several each, got {gpus}. Change `copies`.")
    return {"shared_by": gpus // copies, "shares_experts": share == EXPERTS}


def run_time(shape: ModelShape, run: RunShape, flops: float, price: float | None) -> Time:
    """Returns duration and cost at the operations a second that each GPU executes; `price` as in `measured_time`."""
    tokens = run.micro_batch * run.mean_length
    return measured_time(run, flops * tokens / operations(shape, run).total, price)


def measured_time(run: RunShape, tokens_per_second: float, price: float | None) -> Time:
    """Returns duration and cost at a measured speed of one GPU; `price` is that of one GPU for an hour."""
    hours = run.steps * run.accumulate * run.micro_batch * run.mean_length / tokens_per_second / 3600
    return Time(tokens_per_second, hours, None if price is None else hours * run.gpus * price)
