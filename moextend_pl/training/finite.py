"""A step whose loss or gradient is not finite is skipped, on all ranks alike.

Shapes: P parameters that learn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from moextend_pl.contracts import UserError
from moextend_pl.runs.numbers import check_finite
from moextend_pl.runs.sharded import local
from moextend_pl.training.losses import sum_over_ranks
from moextend_pl.training.termination import EndTogether

log = logging.getLogger(__name__)
SHOWN_KEYS = 8


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """Returns the largest size of a number in each of P tensors, (P,) in fp32, NaN where one is; asks for no value."""
    given = list(tensors)
    if any(tensor.is_cuda for tensor in given):
        sizes = [*torch._foreach_norm(given, math.inf)]  # all in a few kernels
    else:
        sizes = [torch.stack([*torch.aminmax(tensor)]).abs().amax() for tensor in given]  # a tenth of the norm's time
    return torch.stack([size.float() for size in sizes])


@dataclass
class Step:
    """What is known of a step, and verdicts that may still be on their way to the host.

    Attributes:
        number: Steps before it.
        keys: Its samples on this rank.
        statistics: What batch normalisation held before it.
        bad_loss: Whether a loss of this rank was not finite, a scalar.
        gradients: Names of the P gradients.
        sizes: (P,) their largest numbers.
        outputs: Largest numbers of what modules returned, in the order of their calls, where they were watched.
        flags: Whether the step is skipped, whether a loss of any rank was not finite, whether a rank was told to end,
            whether a loss of this rank was not finite.
        arrived: Tells when the flags are on the host; None if they are.
    """

    number: int = 0
    keys: list[str] = field(default_factory=list)
    statistics: dict[Tensor, Tensor] = field(default_factory=dict)
    bad_loss: Tensor | None = None
    gradients: list[str] = field(default_factory=list)
    sizes: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    flags: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def judge(self, parameters: Mapping[str, nn.Parameter], device: torch.device, told: bool = False) -> Tensor:
        """Finds whether the step is to be skipped; one sum over ranks, and no value is asked for.

        Args:
            parameters: Whose gradients are looked at, by name.
            device: Where the verdict is needed.
            told: Whether this rank was told to end, which travels with the verdict.

        Returns:
            A scalar in fp32: 1 to skip, 0 to take the step; equal on all ranks.
        """
        gradients = {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
        gradients = {name: gradient for name, gradient in gradients.items() if gradient.numel()}
        own = torch.zeros((), device=device) if self.bad_loss is None else self.bad_loss.to(device).float()
        bad = own
        if gradients:
            self.gradients, self.sizes = list(gradients), largest(gradients.values()).to(device)
            bad = torch.maximum(own, self.sizes.isfinite().all().logical_not().float())
        note = torch.full((), float(told), device=device)
        flags = torch.cat([sum_over_ranks(torch.stack([bad, own, note])).clamp(max=1), own[None]])
        self.flags = flags.to("cpu", non_blocking=True) if flags.is_cuda else flags
        if flags.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        return flags[0]

    def read(self) -> list[bool]:
        """Returns the flags."""
        assert self.flags is not None
        if self.arrived is not None:
            self.arrived.synchronize()
        return [bool(flag) for flag in self.flags.tolist()]

    def describe(self) -> str:
        """Says what was not finite, where, and with which samples."""
        _, any_loss, _, own_loss = self.read()
        keys = ", ".join(self.keys[:SHOWN_KEYS]) + (" ..." if len(self.keys) > SHOWN_KEYS else "")
        what = "the loss" if own_loss else "the loss of another rank" if any_loss else "a gradient"
        sizes = [] if self.sizes is None else self.sizes.tolist()
        wrong = [name for name, size in zip(self.gradients, sizes, strict=False) if not math.isfinite(size)]
        module = next((name for name, size in self.outputs.items() if not math.isfinite(size)), "")
        place = "on another rank"
        if module:
            place = f"from the output of {module} on"
        elif wrong:  # the last one is the nearest to the loss: from there it spreads to all before it
            place = f"from the gradient of {wrong[-1]} on"
        return f"step {self.number}: {what} is not finite, {place}, with the samples {keys or '(unknown)'}"


class Outputs:
    """Looks at what every module of a model returns, after a step went wrong: where NaN or infinity comes from."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self.sizes: dict[str, Tensor] = {}

    def watch(self, model: nn.Module) -> None:
        """Begins, where it has not begun."""
        if not self._handles:
            leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
            self._handles = [module.register_forward_hook(partial(self._note, name)) for name, module in leaves]

    def end(self) -> None:
        """Ends."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                self.sizes.setdefault(name, largest([value.detach()])[0])


class NumbersGuard(Callback):
    """Skips steps whose loss or gradient is not finite, on all ranks alike, and ends a run that has many in a row.

    A skipped step counts, but leaves weights, moments and statistics as they were. It is told with its samples; on a
    GPU one step later, since nothing waits for the device. Every stage module brings this guard; name it under
    `trainer.callbacks` to set its number.

    Args:
        in_a_row: Skipped steps one after another that end the run.

    Raises:
        UserError: If that is no number above 0.
    """

    def __init__(self, in_a_row: int = 3) -> None:
        if in_a_row < 1:
            raise UserError(f"Expected `in_a_row` of NumbersGuard of at least 1, got {in_a_row}.")
        self.in_a_row = in_a_row
        self._now: Step | None = None
        self._sent: Step | None = None
        self._outputs = Outputs()
        self._row = self._skipped = self._taken = 0
        self._taught = False
        self._ending: EndTogether | None = None

    def state_dict(self) -> dict[str, Any]:
        """Keeps the numbers of skipped and of other steps, and whether there was anything to learn."""
        return {"skipped": self._skipped, "taken": self._taken, "taught": self._taught}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what an earlier start kept."""
        self._skipped, self._taken = int(state_dict["skipped"]), int(state_dict["taken"])
        self._taught = bool(state_dict["taught"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets a step that an earlier run did not finish."""
        self._now, self._sent, self._row = None, None, 0
        there: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._ending = next((each for each in there if isinstance(each, EndTogether)), None)
        if self._ending is not None:
            self._ending.carried = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the samples, and what a pass through the model changes."""
        if self._now is None:
            norms = [m for m in pl_module.modules() if isinstance(m, _BatchNorm) and m.training]
            buffers = {buffer: buffer.clone() for norm in norms for buffer in norm.buffers()}
            self._now, self._outputs.sizes = Step(trainer.global_step, statistics=buffers), {}
        self._now.keys += list(batch.get("keys", ())) if isinstance(batch, Mapping) else []
        self._taught = self._taught or teaches(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Looks at the loss of a batch."""
        assert self._now is not None
        bad = loss.detach().isfinite().logical_not().any()
        self._now.bad_loss = bad if self._now.bad_loss is None else self._now.bad_loss | bad

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Looks at the gradients, and lets the optimizer leave everything as it is where they are none."""
        step, self._now = self._now, None
        assert step is not None
        step.outputs = self._outputs.sizes
        # A scaler of float16 meets infinite gradients by design, and skips them itself.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        told = self._ending is not None and bool(self._ending.notes.told)
        skip = step.judge({} if scaled else dict(pl_module.named_parameters()), pl_module.device, told)
        with torch.no_grad():
            for buffer, before in step.statistics.items():
                buffer.copy_(torch.where(skip.bool(), before, buffer))
        step.statistics = {}
        skip_step(optimizer, skip)
        self._settle(pl_module)
        self._sent = step
        if step.arrived is None:
            self._settle(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses results of a run that learned nothing, or that are not finite, before one is written.

        Raises:
            UserError: If it is so.
        """
        self._settle(pl_module)
        if not bool(sum_over_ranks(torch.tensor(float(self._taught), device=pl_module.device))):
            raise UserError(
                "Expected a run that learns, got one whose batches held nothing to learn: all their samples were bad. "
                "Nothing was written. `bad_samples.jsonl` in the run directory says what is wrong with them."
            )
        if self._skipped and not self._taken:
            raise UserError(
                f"Expected a run that learns, got one whose {self._skipped} steps were all skipped, since loss or "
                "gradients were not finite. Nothing was written. Look at the data and at `optim.lr`."
            )
        learned = {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
        check_finite(learned, "what was learned", "Nothing was written. Lower `optim.lr`.")

    def _settle(self, module: LightningModule) -> None:
        """Reads what became of the step before.

        Raises:
            UserError: If it is one too many that was skipped.
        """
        step, self._sent = self._sent, None
        if step is None:
            return
        skipped, _, told, _ = step.read()
        if told and self._ending is not None:
            self._ending.agreed = True
        if not skipped:
            self._row, self._taken = 0, self._taken + 1
            self._outputs.end()
            return
        self._row, self._skipped = self._row + 1, self._skipped + 1
        if self._row >= self.in_a_row:
            self._outputs.end()
            raise UserError(
                f"Expected finite losses and gradients, got {self._row} steps in a row without; {step.describe()}. "
                "Nothing of these steps was kept. Lower `optim.lr`, or look at these samples."
            )
        log.warning("%s; the step is skipped", step.describe())
        self._outputs.watch(module)


def teaches(batch: Any) -> bool:
    """Tells whether there is anything to learn from a batch, asking the device for nothing; if unknown, there is."""
    if not isinstance(batch, Mapping):
        return True
    if "known" in batch:
        return bool(batch["known"].learned.numel())
    return bool(batch.get("image_keys", True))


def skip_step(optimizer: Optimizer, skip: Tensor) -> None:
    """Lets an optimizer leave weights and state as they are in its next step.

    Args:
        optimizer: One with `found_inf` reads the verdict on the device; for any other it is waited for.
        skip: 1 to skip.
    """
    if hasattr(optimizer, "found_inf"):
        optimizer.found_inf = skip
    elif bool(skip):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # what has no gradient is left alone, its moments too
