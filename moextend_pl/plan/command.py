"""`python -m moextend_pl plan`: memory, hours and cost of a stage, before anything is downloaded or rented."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moextend_pl.contracts import UserError

if TYPE_CHECKING:
    from moextend_pl.plan.report import Report
    from moextend_pl.plan.stage_model import StageModel

SCHEMA = 1
# Public trainings of mixture-of-experts models report 24 to 28 % of the peak (MoE-LLaVA, NeMo AutoModel).
DEFAULT_MFU = 0.3
DESCRIPTION = """\
Prints what a stage needs and costs. Takes --config and the other options of `fit`, reads no weights and no data:
what is not there yet is replaced by model/config.json, tower/config.json and extension_plan.yaml beside the stage file.
"""
POSITIVE = ("gpu_tflops", "gpu_memory", "gpus", "price", "mfu", "tokens_per_second", "length", "mean_length")
PACKED = "packing is not counted: a row is planned as one conversation with one image"
LOOKED_AT = "of gated cross-attention weights and optimizer are planned, and neither its operations nor its activations"
TILED = "every picture is planned with the most tiles, {} with its thumbnail; their tags count as text"
TAUGHT = "of distillation the teacher's weights and forward pass are planned, and not what the terms keep"
QUANTISED = "{} is quantised already: weights are planned as its unquantised model's"


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's own options; all others are those of `fit`."""
    name = "python -m moextend_pl plan"
    parser = argparse.ArgumentParser(prog=name, description=DESCRIPTION, allow_abbrev=False, exit_on_error=False)
    add = parser.add_argument
    add("--gpu", help="h200, h100, a100-80g, a800-80g, rtx4090, ...; another one with the next two options")
    add("--gpu-tflops", type=float, help="dense 16-bit speed of the card, 10^12 operations a second")
    add("--gpu-memory", type=float, help="memory of the card, 10^9 bytes")
    add("--gpus", type=int, help="number of GPUs; the global batch stays (default: as the config says)")
    add("--price", type=float, help="US dollars for one GPU and hour")
    add("--mfu", type=float, default=DEFAULT_MFU, help="share of the speed that is reached (default %(default)s)")
    add("--tokens-per-second", type=float, help="measured on one GPU; replaces --mfu")
    add("--length", type=int, help="tokens of a padded sequence (default: `data.rows.max_length`)")
    add("--mean-length", type=float, help="tokens of a mean sequence, for operations and time (default: --length)")
    add("--json", type=Path, help="also write all numbers to this file")
    return parser


def main(argv: Sequence[str]) -> int:
    """Prints the plan of a stage; also one that does not fit ends with code 0.

    Raises:
        UserError: For mistakes in the config or the options.
    """
    try:
        options, rest = options_parser().parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}.") from error
    for name in POSITIVE:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"Expected `--{name.replace('_', '-')}` > 0, got {value:g}.")
    if options.mfu > 1:
        raise UserError(f"Expected `--mfu` in (0, 1], the share of the card's speed, got {options.mfu:g}.")
    if options.json is not None and options.json.is_dir():
        raise UserError(f"Expected a file for `--json`, got the folder {options.json}. Name a file in it.")
    report = make_report(options, rest)
    sys.stdout.write(report.text() + "\n")
    if options.json:
        # Imported here as all else that takes seconds: torch comes with it.
        from moextend_pl.runs.atomic import write_json

        write_json(options.json, {"schema": SCHEMA, **asdict(report)})
    return 0


def uncounted(stage: StageModel) -> list[str]:
    """Says in one sentence each what a stage does that the arithmetic leaves out."""
    from moextend_pl.models.model_folder import is_quantised
    from moextend_pl.samples.tiling.tiles import Tiling

    notes = [TAUGHT] if hasattr(stage.module, "teacher") else []
    data = (stage.config.get("data") or {}).get("init_args") or {}
    if (data.get("rows") or {}).get("packing"):
        notes.append(PACKED)
    if getattr(getattr(stage.module, "projector", None), "cross_attention", 0):
        notes.append(LOOKED_AT)
    tiles = Tiling.parse(getattr(getattr(stage.module, "encoder", None), "config", {}).get("tiles"))
    if tiles.most:
        notes.append(TILED.format(tiles.most_squares))
    base = getattr(getattr(stage.module, "language", stage.module), "base", None)
    return [*notes, QUANTISED.format(base)] if is_quantised(base) else notes


def make_report(options: argparse.Namespace, stage_options: Sequence[str]) -> Report:
    """Builds the stage on the meta device and does the arithmetic.

    Raises:
        UserError: For mistakes in the config or the options.
    """
    from moextend_pl.plan import advice, cost, sharing
    from moextend_pl.plan.facts import choose_gpu
    from moextend_pl.plan.operations import operations
    from moextend_pl.plan.report import Report
    from moextend_pl.plan.run_shape import Wishes, measured_time, run_shape, run_time
    from moextend_pl.plan.shapes import read_shape
    from moextend_pl.plan.stage_model import read_stage

    gpu = choose_gpu(options.gpu, options.gpu_tflops, options.gpu_memory)
    stage = read_stage(stage_options)
    shape = read_shape(stage.module, stage.compute_dtype.itemsize, stage.mixed)
    run = run_shape(
        stage.config,
        Wishes(options.gpus, options.length, options.mean_length),
        shape,
        compute_bytes=stage.compute_dtype.itemsize,
        cast_copies=stage.is_mixed,
        nf4=stage.compute.quantize == "nf4",
        recompute=stage.compute.activation_checkpointing,
        compiled=stage.compute.compile,
        recompute_images=getattr(stage.module, "activation_checkpointing", False),
    )
    time = None
    if options.tokens_per_second:
        time = measured_time(run, options.tokens_per_second, options.price)
    elif gpu is not None:
        time = run_time(shape, run, options.mfu * gpu.flops, options.price)
    return Report(
        stage=f"{stage.precision}, {run.gpus} x {gpu.name if gpu else 'GPU'}",
        notes=(*stage.notes, *uncounted(stage), *sharing.sent(shape, run)),
        shape=shape,
        run=run,
        memory=sharing.memory(shape, run),
        operations=operations(shape, run),
        checkpoint_bytes=cost.checkpoint_bytes(shape),
        gpu=gpu,
        time=time,
        verdict=advice.verdict(shape, run, gpu) if gpu else "name a card with --gpu to see whether it fits",
    )
