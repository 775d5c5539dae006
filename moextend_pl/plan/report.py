"""The plan of a stage: all its numbers, and how they are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moextend_pl.plan.cost import NF4_BYTES, Memory, RunShape
from moextend_pl.plan.facts import Gpu, ModelShape
from moextend_pl.plan.operations import Operations
from moextend_pl.plan.run_shape import Time

NAME, NUMBER = 30, 17
Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Report:
    """The plan of a stage.

    Attributes:
        stage: Precision and machine.
        notes: What was taken from beside the stage file.
        shape: The model.
        run: What a step does.
        memory: Bytes on each GPU.
        operations: Of one micro-batch of one GPU.
        checkpoint_bytes: Size of a checkpoint.
        gpu: The card, if one was named.
        time: Duration and cost, if a card or a speed was named.
        verdict: One line: whether it fits, and what would help.
    """

    stage: str
    notes: tuple[str, ...]
    shape: ModelShape
    run: RunShape
    memory: Memory
    operations: Operations
    checkpoint_bytes: float
    gpu: Gpu | None
    time: Time | None
    verdict: str

    def text(self) -> str:
        """Returns the plan as tables, the verdict in the last line."""
        blocks = [
            "\n".join([self.stage, *self.notes]),
            parts_text(self.shape),
            memory_text(self),
            operations_text(self.operations, self.run),
            *([time_text(self.run, self.time)] if self.time else []),
            self.verdict + (f"; {self.time.hours:,.1f} hours" if self.time else "") + self._cost(),
        ]
        return "\n\n".join(blocks)

    def _cost(self) -> str:
        return f", {self.time.cost:,.0f} USD" if self.time and self.time.cost is not None else ""


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligns rows: the first column to the left, numbers to the right, a last remark to the left."""
    lines = []
    for first, *rest in rows:
        numbers = "".join(f"{value:>{NUMBER}}" for value in rest[:2])
        lines.append(f"  {first:<{NAME}}{numbers}{'  ' + rest[2] if len(rest) > 2 else ''}".rstrip())
    return "\n".join(lines)


def gb(size: float) -> str:
    """Returns bytes in units of 10^9, with one decimal."""
    return "< 0.1" if 0 < size < 0.05e9 else f"{size / 1e9:,.1f}"


def parts_text(shape: ModelShape) -> str:
    """Lists the parts of the model: parameters, memory, type, and whether they learn."""
    rows: Rows = [("parameters", "number", "GB")]
    for part in shape.parts:
        rows.append((part.name, f"{part.parameters:,}", gb(part.bytes), _state(part.dtype, part.learning)))
    learning = sum(part.learning for part in shape.parts)
    total = sum(part.parameters for part in shape.parts)
    rows.append(("all", f"{total:,}", gb(sum(part.bytes for part in shape.parts)), f"{learning:,} learn"))
    packed = sum(part.quantisable for part in shape.parts)
    if packed:
        saved = sum(part.quantisable * (part.bytes / part.parameters - NF4_BYTES) for part in shape.parts)
        rest = sum(part.bytes for part in shape.parts) - saved
        rows.append(("all, with quantize: nf4", "", gb(rest), f"{packed:,} in 4 bits"))
    return aligned(rows)


def _state(dtype: str, learning: int) -> str:
    return f"{dtype}, {'learns' if learning else 'frozen'}"


def memory_text(report: Report) -> str:
    """Lists the memory of each GPU and the sizes of files."""
    need, run = report.memory, report.run
    rows: Rows = [
        ("memory of each GPU", "", "GB"),
        ("weights", "", gb(need.weights), "nf4" if run.nf4 else ""),
        ("gradients", "", gb(need.gradients)),
        ("optimizer (AdamW)", "", gb(need.optimizer)),
        *([("gradients that are sent", "", gb(need.buckets))] if need.buckets else []),
        *([("gathered layers", "", gb(need.gathered), f"of {run.shared_by} GPUs")] if need.gathered else []),
        ("activations", "", gb(need.activations), f"{run.micro_batch} x {run.length:,} tokens at a time"),
        ("temporaries", "", gb(need.temporaries), "scores of the head" + (" or an unpacked layer" if run.nf4 else "")),
        ("total", "", gb(need.total)),
    ]
    files: Rows = [
        ("files", "", "GB"),
        ("delta", "", gb(report.shape.delta_bytes)),
        ("checkpoint", "", gb(report.checkpoint_bytes)),
    ]
    return f"{aligned(rows)}\n\n{aligned(files)}"


def operations_text(executed: Operations, run: RunShape) -> str:
    """Lists operations per token, and what the run processes."""
    tokens = run.micro_batch * run.mean_length
    kinds = {
        "forward": executed.forward,
        **({"forward, computed again": executed.again} if executed.again else {}),
        "backward to inputs": executed.inputs,
        "backward to weights that learn": executed.weights,
        "vision tower": executed.tower,
        **({"teacher, forward": executed.teacher} if executed.teacher else {}),
        "total": executed.total,
    }
    rows: Rows = [("operations per token", "", "10^9")]
    rows += [(name, "", f"{value / tokens / 1e9:,.1f}") for name, value in kinds.items()]
    step = run.micro_batch * run.accumulate * run.gpus
    counts: Rows = [
        ("run", "", "number"),
        ("optimizer steps", "", f"{run.steps:,}"),
        ("sequences", "", f"{run.steps * step:,}", f"{step:,} a step"),
        ("tokens", "", f"{run.steps * step * run.mean_length:,.0f}", f"{run.mean_length:,.0f} a sequence"),
    ]
    return f"{aligned(rows)}\n\n{aligned(counts)}"


def time_text(run: RunShape, time: Time) -> str:
    """Lists speed, duration and cost."""
    rows: Rows = [
        ("time", "", ""),
        ("tokens a second of one GPU", "", f"{time.tokens_per_second:,.0f}"),
        ("hours", "", f"{time.hours:,.1f}", f"{time.hours * run.gpus:,.1f} GPU hours"),
    ]
    return aligned(rows + ([("cost, USD", "", f"{time.cost:,.0f}")] if time.cost is not None else []))
