"""The face of the method: picks layers in a probe run, grows experts in an extend run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from callbacks.usage_report import USAGE_FILE, Counts, check_validation_set, measure_usage, usage_lists
from moextend_pl.contracts import PLAN_FILE, ExtensionPlan, LayerGrowth, UserError, run_directory
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.extension.growth import router_parameters
from moextend_pl.moe.selection import LayerRule, random_experts, source_experts
from moextend_pl.reports.plots import plot_scores, plot_usage
from moextend_pl.runs.atomic import write_atomically, write_json
from moextend_pl.runs.sharded import sharded_as, whole

log = logging.getLogger(__name__)

SOURCES = ("after", "before", "random")


def check_task_is_taught(plan: ExtensionPlan, data: Any) -> None:
    """Refuses a plan whose new experts no sample would ever reach.

    Args:
        plan: With or without a task.
        data: The data module, whose `train` names folders or sets with a `task`; any other is not asked.

    Raises:
        UserError: If none of the sets is of the plan's task.
    """
    train = getattr(data, "train", None)
    sets = train if isinstance(train, list) else [train]
    if not plan.task or plan.routing == "open" or not all(isinstance(one, str) or hasattr(one, "task") for one in sets):
        return
    tasks = sorted({getattr(one, "task", "") for one in sets})
    if plan.task not in tasks:
        raise UserError(
            f"The extension plan keeps its new experts for the task {plan.task!r}, got training data of the tasks "
            f"{tasks}: no sample would reach them. Name it in `data.train`, for example "
            f"`{{path: FOLDER, task: {plan.task}}}`."
        )


class ExpertExtension(Callback):
    """With `rule` it picks, with `plan` it grows.

    *Probe run* (`rule`): measures expert usage over the validation set before training and after it,
    chooses layers by the rule and source experts by usage, puts the routers back as they were, and
    writes `extension_plan.yaml`, `usage.json` and the heat maps.

    *Extend run* (`plan`): reads a plan in `setup` and declares it; the module grows when it is built,
    so that resuming and distributed training see the grown model from the start. A model that starts
    from an extended run (`init_from`) grows on top of it, and what was new there is frozen now.

    Args:
        rule: Layer rule of a probe run.
        plan: Plan file of an extend run.
        new_experts: New experts in each chosen layer.
        source: Whether source experts are the most used `after` the probe (as the paper's code) or `before` it (as its
            Eq. 8), or drawn at `random`, to compare with, by `seed`.
        init: `copy` or `preserving`; in an extend run it replaces the plan's.
        routing: `masked`, `masked_tokens`, `masked_sound` or `open`; likewise.
        calibration: `additive`, `multiplicative` or `none`; likewise.
        seed: Seed of the calibration weights; likewise.
        task: Name of the task that masked routing keeps the new experts for; likewise.

    Raises:
        UserError: If neither or both of `rule` and `plan` are given.

    Example:
        callbacks:
          - class_path: callbacks.ExpertExtension
            init_args: {plan: runs/probe/extension_plan.yaml, routing: masked}
    """

    def __init__(
        self,
        rule: LayerRule | None = None,
        plan: str | None = None,
        new_experts: int = 1,
        source: str = "after",
        init: str | None = None,
        routing: str | None = None,
        calibration: str | None = None,
        seed: int | None = None,
        task: str | None = None,
    ) -> None:
        if (rule is None) == (plan is None):
            raise UserError("Expected exactly one of `rule` (probe run) and `plan` (extend run) in ExpertExtension.")
        if source not in SOURCES:
            raise UserError(f"Expected `source` of ExpertExtension in {list(SOURCES)}, got {source!r}. Correct it.")
        if new_experts < 1:
            raise UserError(f"Expected `new_experts` >= 1, got {new_experts}.")
        if plan is not None and (new_experts, source) != (1, "after"):
            raise UserError(
                f"`new_experts` and `source` of ExpertExtension belong to a probe run; {plan} names a source expert "
                "for each new one. Edit its `sources`, or leave the two options out."
            )
        self.rule, self.new_experts, self.source = rule, new_experts, source
        options = {"init": init, "routing": routing, "calibration": calibration, "seed": seed, "task": task}
        self.options: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        self.plan = replace(ExtensionPlan.load(Path(plan)), **self.options) if plan is not None else None
        self._routers: list[torch.Tensor] = []
        self._before: Counts = {}
        self._ended = False

    def setup(self, trainer: Trainer, pl_module: MoExtend, stage: str) -> None:
        """Declares the plan of an extend run.

        Raises:
            UserError: If a probe is to be run on a model that sees no pictures or without a validation set, or no
                token would ever reach the new experts of the plan.
        """
        if self.rule is not None and not isinstance(pl_module, MoExtend):
            raise UserError(
                f"Expected a model of class moextend_pl.MoExtend for `ExpertExtension.rule`, got "
                f"{type(pl_module).__name__}: a probe asks which experts pictures choose. Give a `plan` instead."
            )
        data = getattr(trainer, "datamodule", None)
        # `plan` declares without a trainer, and measures nothing.
        if self.rule is not None and stage == "fit" and trainer is not None:
            check_validation_set(trainer)
        if self.plan is not None:
            if self.plan.routing != "open" and not isinstance(pl_module, MoExtend):
                raise UserError(
                    f"Expected `routing: open` for {type(pl_module).__name__}, which sees no pictures, got "
                    f"{self.plan.routing!r}: no token would reach the new experts."
                )
            if self.plan.routing == "masked_sound" and getattr(pl_module, "hearing", None) is None:
                raise UserError(
                    "Expected a model with `hearing` for `routing: masked_sound`, got one that does not hear: no token "
                    "would reach the new experts. Give the model `hearing`, or set `routing: masked`."
                )
            if stage == "fit":
                check_task_is_taught(self.plan, data)
            pl_module.extension_plan = self.plan

    def state_dict(self) -> dict[str, Any]:
        """Keeps what a resumed probe can no longer see: routers and usage from before it, and whether it has ended."""
        return {"routers": self._routers, "before": self._before, "ended": self._ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over routers and usage from before the probe."""
        self._routers, self._before = list(state_dict["routers"]), dict(state_dict["before"])
        self._ended = bool(state_dict.get("ended", False))

    def on_fit_start(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Tries the rule, and warns where a further extension would not leave the earlier ones as they were.

        Raises:
            UserError: If the rule names layers, or a number of new experts, that the model does not have.
        """
        if not isinstance(pl_module, MoExtend):
            return
        if self.rule is not None:
            # What it will be asked at the end of the probe, which is too late to learn of a mistake.
            even = {
                "all": {layer: torch.ones(n, dtype=torch.long) for layer, n in pl_module.language.num_experts.items()}
            }
            self.choose(even, even)
        learns = any(parameter.requires_grad for parameter in pl_module.projector.parameters())
        if len(pl_module.plans) > 1 and learns:
            log.warning(
                "the projector learns, so that answers of the earlier extension about pictures change; leave "
                "`projector` out of `TrainOnly.parts` to keep them bit-identical"
            )

    def on_train_start(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Remembers the routers and measures usage, at the first start of a probe.

        Raises:
            UserError: If more steps are asked of a probe that has ended, whose routers were put back.
        """
        if self._ended:
            raise UserError(
                f"Expected a probe to go on, got one that ended at step {trainer.global_step}: its routers were put "
                f"back, so that further steps would not follow from those before. Start it again with `--fresh`."
            )
        if self.rule is not None and not self._routers:
            self._routers = [whole(p).clone() for p in router_parameters(pl_module.language.model)]
            self._before = measure_usage(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Measures again, puts the routers back and writes the plan of a probe."""
        if self.rule is None:
            return
        after = measure_usage(trainer, pl_module)
        with torch.no_grad():
            for parameter, original in zip(router_parameters(pl_module.language.model), self._routers, strict=True):
                parameter.copy_(sharded_as(original, parameter))
        self._ended = True
        plan = self.choose(self._before, after)
        if trainer.is_global_zero:
            self._write(run_directory(trainer), plan, after)

    def choose(self, before: Counts, after: Counts) -> ExtensionPlan:
        """Applies the rule to counts by token kind and layer, from before the probe and from after it."""
        assert self.rule is not None
        layers = self.rule.choose(before["all"], after["all"])
        used = before["all"] if self.source == "before" else after["all"]
        growth = tuple(LayerGrowth(layer, self._sources(layer, used[layer])) for layer in layers)
        report = {
            "rule": type(self.rule).__name__,
            "source": self.source,
            "scores": {
                layer: round(score, 6) for layer, score in self.rule.scores(before["all"], after["all"]).items()
            },
        }
        return ExtensionPlan(layers=growth, report=report, **self.options)

    def _sources(self, layer: int, used_E: torch.Tensor) -> tuple[int, ...]:
        if self.source == "random":
            return random_experts(len(used_E), self.new_experts, self.options.get("seed", 0), layer)
        return source_experts(used_E, self.new_experts)

    def _write(self, run: Path, plan: ExtensionPlan, after: Counts) -> None:
        data = {"before": usage_lists(self._before), "after": usage_lists(after)}
        write_json(run / USAGE_FILE, data)
        write_atomically(run / PLAN_FILE, plan.save)
        plot_usage({"before": self._before, "after": after}, run / "plots" / "usage.png")
        chosen = [growth.layer for growth in plan.layers]
        plot_scores(plan.report["scores"], chosen, plan.report["rule"], run / "plots" / "shift.png")
        lines = [
            f"  layer {layer}: shift {score:.4f}" + ("  extended" if layer in chosen else "")
            for layer, score in plan.report["scores"].items()
        ]
        log.info("%s chose layers %s:\n%s", plan.report["rule"], chosen, "\n".join(lines))
