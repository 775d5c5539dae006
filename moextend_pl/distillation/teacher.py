"""Who teaches: a finished run, a folder of a language model, or the base that the student grows on. Always frozen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moextend_pl.contracts import Batch, UserError
from moextend_pl.distillation.fitting import check_pictures, check_placeholders
from moextend_pl.distillation.scopes import Places
from moextend_pl.distillation.signals import Signals, hearing
from moextend_pl.models.base_model import ComputeSpec, logits_of, set_attention
from moextend_pl.models.delta import language_arguments
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.fingerprints import fingerprints
from moextend_pl.runs.manifest import read_manifest
from moextend_pl.samples.packing import attention_inputs


@dataclass(frozen=True)
class TeacherSpec:
    """Which model teaches; where neither `run` nor `base` is given, the student's own base without its extensions.

    Attributes:
        run: Run directory of a finished run, whose model teaches all samples.
        base: Folder of a transformers model, which teaches samples without a picture.
        dense: Whether `base` is meant to be a model without experts.
        quantize: `nf4` holds the teacher's base in 4 bits; None as it is.
    """

    run: str | None = None
    base: str | None = None
    dense: bool = False
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.run is not None and self.base is not None:
            raise UserError("Expected `run` or `base` of `teacher`, got both. Remove one of them.")
        if self.is_own_base and (self.quantize is not None or self.dense):
            raise UserError("`quantize` and `dense` of `teacher` need its `run` or `base`, got neither. Remove them.")

    @property
    def sees(self) -> bool:
        """Whether it can be shown pictures."""
        return self.run is not None

    @property
    def is_own_base(self) -> bool:
        """Whether the student's own base teaches."""
        return self.run is None and self.base is None


@dataclass
class Teacher:
    """A frozen model beside the student. No module: nothing of it is saved, learned or sharded with the student.

    Attributes:
        spec: Which one.
        model: What `read` has read; None where the student's own base teaches.
        facts: What it is made of, by content.
    """

    spec: TeacherSpec
    model: MoExtend | MoELanguageModel | None = None
    facts: dict[str, str] = field(default_factory=dict)

    @cached_property
    def unbuilt(self) -> MoELanguageModel | None:
        """Its language model before any weight is read: what it is called and how wide it is."""
        if self.spec.run is not None:
            arguments = read_manifest(Path(self.spec.run)).model_arguments()["language"]
            # Whether its experts were upcycled changes neither.
            return MoELanguageModel(**language_arguments({**arguments, "upcycle": None}))
        if self.spec.base is not None:
            return MoELanguageModel(base=self.spec.base, dense=self.spec.dense)
        return None

    def read(self, student: MoExtend) -> None:
        """Reads its weights, in the type that the run makes models in, and freezes it; the student's base is there.

        Args:
            student: Need not be built; its attention is computed alike.

        Raises:
            UserError: If its files are damaged, or it is to be shown pictures otherwise than the student.
        """
        attention = student.language.compute.attn_implementation
        if self.spec.run is not None:
            manifest = read_manifest(Path(self.spec.run))
            self.model = whole = MoExtend.load(manifest.run, quantize=self.spec.quantize)
            check_placeholders(whole)
            check_pictures(whole.sample_spec(), student.sample_spec())
            set_attention(whole.language.model, attention)
            self.facts = {"delta": manifest.delta_sha256, "frozen": told(manifest.frozen)}
        elif self.spec.base is not None:
            compute = ComputeSpec(quantize=self.spec.quantize, attn_implementation=attention)
            self.model = MoELanguageModel(base=self.spec.base, dense=self.spec.dense, compute=compute)
            self.model.configure_model()
            self.facts = {"base": told(fingerprints(dict(self.model.named_parameters())))}
        if self.model is not None:
            self.model.requires_grad_(False).to(torch.get_default_dtype()).eval()

    def language(self, student: MoExtend) -> MoELanguageModel:
        """Returns the language model that is listened to."""
        if self.model is None:
            return student.language
        return self.model.language if isinstance(self.model, MoExtend) else self.model

    @torch.no_grad()
    def teach(self, student: MoExtend, batch: Batch, places: Places, attention: bool) -> Signals:
        """Says what it makes of a batch; before the student does, whose own pass opens its routing.

        Args:
            student: Built.
            batch: On the device where it is to be computed.
            places: Where logits are computed.
            attention: Whether attention weights are wanted.
        """
        language, image = self.language(student), student.language.image_token_id
        if self.model is not None and next(language.parameters()).device != batch["input_ids"].device:
            self.model.to(batch["input_ids"].device)
        ids_BS = batch["input_ids"].masked_fill(batch["input_ids"] == image, language.image_token_id)
        batch = {**batch, "input_ids": ids_BS, "known": places.asked}
        with hearing(language, attention) as heard:
            if isinstance(self.model, MoExtend):
                language(batch, self.model.embed(batch), places.asked)
            elif self.model is not None:
                language(batch, language.embed(ids_BS), places.asked)
            else:
                _teach_as_base(language, batch)
        language.close_reach()
        return heard


def _teach_as_base(language: MoELanguageModel, batch: Batch) -> None:
    """Lets a student's language model run as the base that it was, to which no new expert is open."""
    language.close_reach()
    mode = language.model.training
    language.model.eval()
    try:
        inputs = {"inputs_embeds": language.embed(batch["input_ids"]), **attention_inputs(language.model, batch)}
        logits_of(language.model, inputs, batch["known"])
    finally:
        language.model.train(mode)


def told(facts: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of plain values, short."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
