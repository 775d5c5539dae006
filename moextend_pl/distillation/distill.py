"""A stage whose model also learns from a frozen teacher; what is trained and left behind is that model alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moextend_pl.contracts import Batch
from moextend_pl.distillation.fitting import (
    check_attention,
    check_learned,
    check_own_base,
    check_placeholders,
    check_structures,
    check_taught,
    check_vocabularies,
)
from moextend_pl.distillation.losses import DistillTerm
from moextend_pl.distillation.presets import chosen_terms
from moextend_pl.distillation.scopes import DistillBatch, Places, find_places, find_scopes
from moextend_pl.distillation.signals import Signals, hearing
from moextend_pl.distillation.teacher import Teacher, TeacherSpec
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.runs.sources import Sources, plain
from moextend_pl.training.language_losses import LanguageOutput
from moextend_pl.training.losses import learned_tokens
from moextend_pl.training.optim import OptimSpec
from moextend_pl.training.sharding.strategy import sharded
from moextend_pl.training.stage import shapes_only

PART = "distillation"
NO_TEACHER = ("test", "predict")


class Distill(MoExtend):
    """MoExtend with terms of distillation beside its own losses.

    Everything else is as without a teacher: parts, plans, checkpoints, the delta. The teacher is no part of the module.

    Args:
        encoder: As in `MoExtend`.
        projector: As in `MoExtend`.
        language: As in `MoExtend`.
        teacher: Which model teaches.
        terms: Terms of the loss, or the name of a preset: `llava_kd`, `llavadi` or `llavadi_shipped`.
        init_from: As in `MoExtend`.
        cache_features: As in `MoExtend`.
        activation_checkpointing: As in `MoExtend`.
        optim: As in `MoExtend`.
    """

    def __init__(
        self,
        *,
        encoder: VisionEncoder,
        projector: Projector,
        language: MoELanguageModel,
        teacher: TeacherSpec,
        terms: str | list[DistillTerm],
        init_from: str | None = None,
        cache_features: bool = True,
        activation_checkpointing: bool = False,
        optim: OptimSpec | None = None,
    ) -> None:
        # Before all else: what the run is made from is asked for where it has a start.
        self.terms, self.teacher = chosen_terms(terms), Teacher(teacher)
        super().__init__(
            encoder=encoder,
            projector=projector,
            language=language,
            init_from=init_from,
            cache_features=cache_features,
            activation_checkpointing=activation_checkpointing,
            optim=optim,
        )
        self.adapters = nn.ModuleDict()
        self.needs_attention = any(term.needs_attention for term in self.terms)

    def build(self) -> None:
        """Reads the teacher, builds the student, and what maps its hidden states to the teacher's width.

        Raises:
            UserError: If the two cannot be compared.
        """
        check_placeholders(self)
        check_attention(self.language.compute, self.terms)
        check_taught(self.teacher.spec.sees, self.terms)
        unbuilt = self.teacher.unbuilt or self.language
        if unbuilt is not self.language:
            check_vocabularies(unbuilt, self.language, self.terms)
        teaches = not shapes_only() and (self._trainer is None or self.trainer.state.fn not in NO_TEACHER)
        if teaches:
            self.teacher.read(self)
        super().build()
        for term in self.terms:
            adapter = term.adapter(self.language.width, unbuilt.width)
            if adapter is not None:
                self.adapters[term.name] = adapter
        check_learned(PART, self.adapters, self.train_plan)
        if teaches:
            check_structures(self.teacher.language(self), self.language, self.terms)

    def configure_model(self) -> None:
        """Builds, grows and freezes, once.

        Raises:
            UserError: If the student's own base is to teach and learns.
        """
        super().configure_model()
        if self.teacher.spec.is_own_base:
            check_own_base(self)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parts of `MoExtend`, and `distillation`: what learns for a term only."""
        return {**super().parts(), PART: list(self.adapters.parameters())}

    def scaffold_names(self) -> set[str]:
        """Returns the names of what learns for a term only, which no delta holds."""
        return {f"adapters.{name}" for name, _ in self.adapters.named_parameters()}

    def sources(self) -> Sources:
        """Returns what decides the result, teacher and terms included."""
        found = super().sources()
        told: dict[str, Any] = {"teacher": self.teacher.facts, "terms": [term.facts() for term in self.terms]}
        return {**found, "optim": {**found["optim"], **plain(told)}}

    def with_host_facts(self, batch: Batch) -> DistillBatch:
        """Adds what a step must know of a batch: which tokens each term is about, beside what `MoExtend` adds."""
        batch = super().with_host_facts(batch)
        if "distilled" in batch:
            return batch  # type: ignore[return-value]
        masks = find_scopes(batch, self.language.image_token_id, self.teacher.spec.sees)
        logits = {name for term in self.terms if term.needs_logits for name in term.scopes}
        return {**batch, "distilled": find_places(batch, batch["known"], masks, logits)}

    def forward(self, batch: Batch) -> LanguageOutput:
        """Computes the losses of a batch, the terms of distillation included."""
        batch = self.with_host_facts(batch)
        teacher = self.teach(batch)
        with hearing(self.language, self.needs_attention) as student:
            output = super().forward(asked(batch))
        found = self.compared(student, teacher, batch["distilled"])
        weighted = [term.weight * found[term.name] for term in self.terms]
        return replace(output, loss=torch.stack([output.loss, *weighted]).sum(), router={**output.router, **found})

    def teach(self, batch: DistillBatch) -> Signals | None:
        """Asks the teacher; None where it has nothing to say of the batch, and no other rank waits for its layers."""
        places = batch["distilled"]
        is_shared = self.teacher.spec.is_own_base and sharded(self) is not None
        if not is_shared and not sum(places.scopes["all"].counts):
            return None
        return self.teacher.teach(self, batch, places, self.needs_attention)

    def compared(self, student: Signals, teacher: Signals | None, places: Places) -> dict[str, Tensor]:
        """Returns every term by name, not weighted; in fp32 whatever the precision of the run.

        Args:
            student: What was heard of it.
            teacher: Likewise; None where no token of the batch is compared.
            places: Tokens of the batch by scope.
        """
        device, adapters = places.asked.learned.device.type, dict(self.adapters.items())
        # The meta device, on which a step is only pretended, knows no autocast.
        knows = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if knows else nullcontext():
            return {
                term.name: term.compare(student, teacher or student, places.scopes, adapters.get(term.name))
                for term in self.terms
            }

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs loss and accuracy of the supervised tokens, and every term."""
        batch = self.with_host_facts(batch)
        teacher = self.teach(batch)
        with hearing(self.language, self.needs_attention) as student:
            output = self.language.losses(asked(batch), self.embed(batch), balanced=False)
        values = {"val/loss": output.token, "val/token_accuracy": output.accuracy}
        values |= {f"val/{name}": value for name, value in self.compared(student, teacher, batch["distilled"]).items()}
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=learned_tokens(batch["labels"]))


def asked(batch: DistillBatch) -> DistillBatch:
    """Returns the batch with logits computed wherever a term reads them; what is learned from labels stays."""
    return {**batch, "known": batch["distilled"].asked}
