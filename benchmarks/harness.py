"""What the benchmarks share: interleaved timing, parity, saved bytes, executed FLOPs, tables and JSON.

All cases of a comparison are built first and then timed in turns (A, B, C, A, B, C, ...) in one process, so
that a busy machine slows all of them alike. Ratios are of medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pages
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moextend_pl.runs.atomic import write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPEED = pages.DOCS / "speed.md"
Row = dict[str, Any]


def parse(description: str, argv: Sequence[str] | None = None, on_page: bool = False) -> argparse.Namespace:
    """Reads the options that every benchmark has, and sets the number of threads.

    Args:
        description: What the benchmark answers.
        argv: Options; by default those of the command line.
        on_page: Whether it has a table in `docs/speed.md`, and so the option to write it.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds: does it work?")
    parser.add_argument("--dtype", choices=sorted(DTYPES), action="append", help="by default both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, help="timed rounds; by default 7, with --quick 2")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of this process only")
    parser.add_argument("--json", type=Path, help="file for the rows and the machine")
    parser.set_defaults(write=False)
    if on_page:
        parser.add_argument("--write", action="store_true", help="put the table for the page into docs/speed.md")
    options = parser.parse_args(argv)
    if options.write and (options.quick or options.dtype):
        parser.error("--write needs the full sizes and both types: leave --quick and --dtype out")
    options.dtype = options.dtype or sorted(DTYPES, reverse=True)
    options.rounds = options.rounds or (2 if options.quick else 7)
    torch.set_num_threads(options.threads)
    return options


def machine(options: argparse.Namespace) -> Row:
    """Describes what the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in cpu.get("flags", "").split() if flag.startswith(("avx", "amx"))]
    device = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
    return {
        "device": device,
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_flags": flags,
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "rounds": options.rounds,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def interleaved(steps: Mapping[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, Row]:
    """Times every step in turns, after one round that is not counted.

    Args:
        steps: What to time, by name.
        options: As read by `parse`.

    Returns:
        By name: `min_ms`, `median_ms`, and `spread`, the distance of the slowest from the fastest round as a
        share of the median.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 1):
        for name, step in steps.items():
            elapsed = _time(step, options)
            if turn:
                seconds[name].append(elapsed)
    return {name: _summary(values) for name, values in seconds.items()}


def _time(step: Callable[[], object], options: argparse.Namespace) -> float:
    if options.device.startswith("cuda"):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    begin = clock()
    step()
    return clock() - begin


def _summary(seconds: Sequence[float]) -> Row:
    median = statistics.median(seconds)
    return {
        "min_ms": round(min(seconds) * 1e3, 3),
        "median_ms": round(median * 1e3, 3),
        "spread": round((max(seconds) - min(seconds)) / median, 3),
    }


def difference(value: Tensor, reference: Tensor) -> float:
    """Returns the norm of the difference as a share of the reference's norm."""
    a, b = value.detach().double(), reference.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Counts the bytes that a forward pass keeps for the backward pass.

    Args:
        forward: Runs the forward pass and nothing else.
        parameters: Tensors that would be there anyway.

    Returns:
        Bytes of all storages kept, each once.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def executed_flops(step: Callable[[], object]) -> int:
    """Counts the floating-point operations that a step does: weight gradients only where they are computed."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_mm_flops}) as counter:
        step()
    return counter.get_total_flops()


def _grouped_mm_flops(a: Tensor, b: Tensor, offs: Tensor, *_: object, **__: object) -> int:
    rows = int(offs[-1])
    if b.dim() == 3:
        return 2 * rows * b.shape[1] * b.shape[2]
    return 2 * rows * a.shape[0] * b.shape[1]


_grouped_mm_flops._get_raw = True  # so that the counter hands over tensors and not their shapes


def table(rows: Sequence[Row]) -> str:
    """Lays rows out in columns; the first row names them."""
    columns = list(rows[0])
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}".rstrip("0").rstrip(".")
    return "-" if value is None else str(value)


def finish(
    question: str, sections: Mapping[str, Sequence[Row]], options: argparse.Namespace, page: Sequence[Row] = ()
) -> int:
    """Prints every section as a table, writes what is asked for, and returns the exit code.

    Args:
        question: What the benchmark answers.
        sections: Rows by title.
        options: As read by `parse`.
        page: Rows as `docs/speed.md` has them, below the mark with the name of the script.
    """
    facts = machine(options)
    print(question)
    print(", ".join(f"{key} {value}" for key, value in facts.items() if key != "cpu_flags"))
    for title, rows in sections.items():
        print(f"\n{title}\n{table(rows)}")
    if page:
        markdown = pages.grid([*page[0]], [[str(value) for value in row.values()] for row in page])
        print(f"\nfor docs/speed.md\n{markdown}")
        if options.write:
            pages.put(SPEED, Path(sys.argv[0]).name, markdown)
    if options.json is not None:
        write_json(options.json, {"question": question, "machine": facts, "sections": dict(sections)})
        print(f"\nwritten to {options.json}")
    return 0
