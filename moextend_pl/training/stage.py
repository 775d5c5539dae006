"""What every LightningModule of the project shares: declared plans, applied once, saved without the frozen base."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from moextend_pl.contracts import Batch, ExtensionPlan, SampleSpec, TrainPlan, UserError
from moextend_pl.runs.numbers import check_finite, checkpoint_tensors
from moextend_pl.runs.sources import (
    DECIDE_ANSWERS,
    DECIDE_WEIGHTS,
    TRAINER,
    Sources,
    differences,
    file_facts,
    plain,
    refuse_other_sources,
)
from moextend_pl.training.finite import NumbersGuard
from moextend_pl.training.losses import count_learned, sum_over_ranks
from moextend_pl.training.optim import (
    OptimSpec,
    apply_train_plan,
    build_optimizer,
    check_learnable,
    check_partition,
    check_steps,
    parameter_groups,
)
from moextend_pl.training.sharding.gradients import clip_gradients
from moextend_pl.training.sharding.reading import reads_parts
from moextend_pl.training.sharding.strategy import check_sharding, sharded
from moextend_pl.training.sharding.units import language_of

log = logging.getLogger(__name__)
ADVICE = "Restore that, or start another run in another `trainer.default_root_dir`."


def shapes_only() -> bool:
    """Tells whether networks are being built on the meta device: shapes, no weights, no file is read."""
    return torch.get_default_device().type == "meta"


class StageModule(LightningModule):
    """A module that one stage trains: callbacks declare plans in `setup`, `configure_model` applies them.

    The networks are built in `configure_model` and not in the constructor, so that a configuration can
    be checked, and a plan declared, before any weight is read. Building twice does nothing.

    Args:
        optim: Optimizer and schedule of the stage.
    """

    def __init__(self, optim: OptimSpec | None = None) -> None:
        super().__init__()
        self.optim = optim or OptimSpec()
        self.train_plan: TrainPlan | None = None
        self.extension_plan: ExtensionPlan | None = None
        # Checkpoints hold no frozen weights; `on_load_checkpoint` checks the keys instead.
        self.strict_loading = False
        self.init_seed = 0
        self._built = False
        self._files: dict[str, Any] | None = None
        self._tokens: Tensor | None = None

    @abstractmethod
    def build(self) -> None:
        """Builds the networks with the weights that the stage starts from, and applies the extension plan."""

    @abstractmethod
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Returns every parameter of the module, in exactly one named part."""

    def frozen_parts(self) -> set[str]:
        """Returns the parts that can never learn, whatever the plan; needs no built networks."""
        return set()

    @abstractmethod
    def sample_spec(self) -> SampleSpec:
        """Returns what the module asks of its data; needs no built networks."""

    def setup(self, stage: str) -> None:
        """Refuses a run without an end, on which the schedule rests, or that cannot be sharded as it is asked to be.

        Raises:
            UserError: If it is so, before any weight is read.
        """
        if stage == "fit":
            check_steps(self.trainer.max_steps)
        check_sharding(self)

    def with_host_facts(self, batch: Batch) -> Batch:
        """Adds what a step must know of a batch, where the module needs to know anything."""
        return batch

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Adds what a step must know of a batch before the batch leaves the host."""
        return self.with_host_facts(batch)

    def configure_callbacks(self) -> list[Callback]:
        """Brings the guard of losses and gradients, where the trainer has none."""
        there: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(each, NumbersGuard) for each in there) else [NumbersGuard()]

    def configure_model(self) -> None:
        """Builds, grows and freezes, once; then shards, where the strategy does.

        Raises:
            UserError: If a weight is not finite, or the plan does not fit.
        """
        strategy = sharded(self)
        if self._built:
            return
        if strategy is None:
            self._make_and_settle()
        elif reads_parts(self):
            strategy.in_turn(self._make, at_once=True)
            self._settle()
        else:
            strategy.in_turn(self._make_and_settle)
        self._built = True

    def _make(self) -> None:
        check_learnable(self.frozen_parts(), self.train_plan, self.optim)
        self._files = self._file_facts()
        # Fresh weights must not depend on what else drew random numbers, on any rank or after a restart.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.init_seed)
            self.build()
        check_partition(self, self.parts())
        apply_train_plan(self.parts(), self.train_plan, self.frozen_parts())

    def _make_and_settle(self) -> None:
        self._make()
        self._settle()

    def _settle(self) -> None:
        check_finite(dict(self.named_parameters()), "the weights that were read", "Restore the files they came from.")
        strategy, language = sharded(self), language_of(self)
        if strategy is not None and language is not None:
            strategy.divide(language)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds the optimizer over what learns; the number of steps is `trainer.max_steps`."""
        groups = parameter_groups(self, self.parts(), self.optim)
        optimizer, scheduler = build_optimizer(groups, self.optim, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def by_tokens(self, loss: Tensor, labels_BS: Tensor) -> Tensor:
        """Weighs a batch by its learned tokens where a step is accumulated over several batches.

        A mean of their means would give a token of a batch with few of them more weight, and the loss of a step
        would depend on how its samples are cut into batches.

        Args:
            loss: Mean over the learned tokens of the batch on all ranks.
            labels_BS: Its labels.

        Returns:
            What a training step returns; `on_before_optimizer_step` divides the gradients again.
        """
        if self._trainer is None or self.trainer.accumulate_grad_batches == 1:
            return loss
        tokens = sum_over_ranks(count_learned(labels_BS))
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        return loss * tokens

    def on_train_start(self) -> None:
        """Forgets the batches of a step that an earlier run did not finish."""
        self._tokens = None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divides accumulated gradients by the tokens of all batches of the step; before they are clipped."""
        if self._tokens is None:
            return
        # Lightning has divided each loss by the number of batches.
        factor = self.trainer.accumulate_grad_batches / self._tokens.clamp(min=1)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self._tokens = None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips gradients; by the norm of all of them also where each rank holds a part."""
        if sharded(self) is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            clip_gradients(parameters, gradient_clip_val, by_value=gradient_clip_algorithm == "value")

    def sources(self) -> Sources:
        """Returns what decides the result beside weights and data; files as they were when the networks were built."""
        plan = None if self.extension_plan is None else self.extension_plan.to_dict()
        found: Sources = {
            "files": self._file_facts() if self._files is None else self._files,
            "plan": {key: value for key, value in (plan or {}).items() if key != "report"},
            "optim": asdict(self.optim),
        }
        if self._trainer is not None:
            found["trainer"] = {name: getattr(self.trainer, name) for name in TRAINER}
            found["told"] = {"trainer.max_steps": self.trainer.max_steps}
        as_saved: Sources = plain(found)
        return as_saved

    def _file_facts(self) -> dict[str, Any]:
        parts = [(name, part) for name, part in self.named_modules() if isinstance(part, StageModule)]
        return {key: value for name, part in parts for key, value in file_facts(part, name).items()}

    def refuse_other_sources(self, checkpoint: dict[str, Any], place: str) -> None:
        """Refuses a checkpoint whose run was made from something else, and tells of another number of steps.

        Args:
            checkpoint: One of an earlier version says nothing of its sources.
            place: Where it lies.

        Raises:
            UserError: If files, plan or, for a run that goes on, optimizer or settings of the trainer are others.
        """
        earlier, now = checkpoint.get("sources", {}), self.sources()
        goes_on = self._trainer is not None and self.trainer.state.fn == "fit"
        refuse_other_sources(earlier, now, DECIDE_WEIGHTS if goes_on else DECIDE_ANSWERS, place, ADVICE)
        for change in differences(earlier.get("told", {}), now.get("told", {})) if goes_on and earlier else ():
            log.warning("%s: learning rates follow the new number", change)

    def checkpoint_names(self) -> set[str]:
        """Returns the names of the tensors that a checkpoint holds: all but the frozen parameters."""
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        return set(self.state_dict()) - frozen

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves frozen parameters out, which are read from the base again, and adds what the run is made from.

        Raises:
            UserError: If what is left holds NaN or infinity; on all ranks, before one writes.
        """
        names = self.checkpoint_names()
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in names}
        checkpoint["sources"] = self.sources()
        check_finite(checkpoint_tensors(checkpoint), "a checkpoint", "It was not written. Lower `optim.lr`.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model or plan, or made from something else, before any weight is read.

        Raises:
            UserError: If the names of its tensors are not those that this run saves, or its sources are others.
        """
        self.refuse_other_sources(checkpoint, "the checkpoint")
        expected, got = self.checkpoint_names(), set(checkpoint["state_dict"])
        if expected != got:
            raise UserError(
                f"The checkpoint does not fit this run: it lacks {sorted(expected - got)[:3]} and has unexpected "
                f"{sorted(got - expected)[:3]}. Resuming needs the same extension plan and the same trained parts; "
                "start a new stage with `init_from` and another `trainer.default_root_dir`."
            )
        check_finite(checkpoint_tensors(checkpoint), "the checkpoint", "Begin anew with `--fresh`.")
