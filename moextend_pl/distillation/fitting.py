"""Whether a student can be compared with a teacher, told before any weight is read where that can be known."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moextend_pl.contracts import SampleSpec, TrainPlan, UserError
from moextend_pl.distillation.losses import DistillTerm
from moextend_pl.distillation.signals import last_attention
from moextend_pl.models.base_model import ComputeSpec
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend

EAGER = "eager"
# What both have to be told alike about a picture.
PICTURE_FACTS = ("tiles", "tokens_per_image", "image_size", "resize", "resample", "image_mean", "image_std")


def check_vocabularies(teacher: MoELanguageModel, student: MoELanguageModel, terms: Sequence[DistillTerm]) -> None:
    """Refuses models that read or predict other words.

    Args:
        teacher: Need not be built.
        student: Need not be built.
        terms: What is to be compared.

    Raises:
        UserError: If it is so; with what can be done instead.
    """
    theirs, ours = (model.tokenizer.get_vocab() for model in (teacher, student))
    if theirs != ours:
        apart = len(theirs.items() ^ ours.items())
        raise UserError(
            f"Expected a teacher with the student's vocabulary, got {len(theirs)} and {len(ours)} words of which "
            f"{apart} have no counterpart: token by token there is nothing to compare. Let the teacher answer the "
            "questions (`python -m moextend_pl predict`), and train on its answers as labels."
        )
    widths = [int(model.model_config().get_text_config().vocab_size) for model in (teacher, student)]
    reading = [term.name for term in terms if term.needs_logits]
    if widths[0] != widths[1] and reading:
        raise UserError(
            f"Expected logits of one width for {reading}, got {widths[0]} of the teacher and {widths[1]} of the "
            "student, who share a tokenizer. Compare hidden states instead: HiddenTerm or AffinityTerm."
        )


def check_attention(compute: ComputeSpec, terms: Sequence[DistillTerm]) -> None:
    """Refuses to compare attention weights that nobody computes.

    Args:
        compute: How the student computes; its teacher does alike.
        terms: What is to be compared.

    Raises:
        UserError: If it is so.
    """
    if any(term.needs_attention for term in terms) and (compute.attn_implementation != EAGER or compute.compile):
        got = compute.attn_implementation or "the default"
        raise UserError(
            "AttentionTerm compares attention weights, which only `eager` attention that is not compiled keeps, got "
            f"{got}{' and `compile`' * compute.compile}. Set `language.compute.attn_implementation: eager`, or leave "
            "the term out."
        )


def check_placeholders(model: MoExtend) -> None:
    """Refuses a model that looks at pictures by cross-attention: its picture tokens have no place among the words.

    Args:
        model: Student or teacher, need not be built.

    Raises:
        UserError: If it is so.
    """
    if model.projector.cross_attention:
        raise UserError(
            "Distillation compares tokens between the words, got a model that looks at pictures by cross-attention "
            f"(`projector.cross_attention: {model.projector.cross_attention}`). Use one whose pictures are tokens."
        )


def check_taught(sees: bool, terms: Sequence[DistillTerm]) -> None:
    """Refuses terms about pictures of which the teacher knows nothing.

    Args:
        sees: Whether the teacher can be shown pictures.
        terms: What is to be compared.

    Raises:
        UserError: If it is so.
    """
    about = [term.name for term in terms if "image" in term.scopes]
    if about and not sees:
        raise UserError(
            f"Expected a teacher that sees pictures for {about}, got one that knows text only. Name the run of a "
            "finished stage as `teacher.run`, or leave these terms out."
        )


def check_learned(part: str, adapters: nn.Module, plan: TrainPlan | None) -> None:
    """Refuses to compare hidden states through a random map that does not learn.

    Args:
        part: Name of the part that the maps are.
        adapters: The maps.
        plan: What learns.

    Raises:
        UserError: If it is so.
    """
    if plan is not None and part not in plan.parts and any(True for _ in adapters.parameters()):
        raise UserError(
            f"HiddenTerm maps the student's hidden states to the teacher's width, and the map has to learn. Add "
            f"{part!r} to `TrainOnly.parts`, or set `project: false` for models of one width."
        )


def check_own_base(student: MoExtend) -> None:
    """Refuses a student's own base as the teacher where it is not what it was, or does not stay so.

    Args:
        student: Built.

    Raises:
        UserError: If it is so.
    """
    parts, language = student.parts(), student.language
    learning = sorted(name for name in ("language", "routers") if any(p.requires_grad for p in parts[name]))
    base = {id(p) for name in ("language", "routers") for p in parts[name]}
    names = {name for name, p in student.named_parameters() if id(p) in base}
    if learning or language.upcycle_spec is not None or names & student.inherited:
        raise UserError(
            "Without `run` and `base` the student's own base teaches, which has to be the original and stay frozen, "
            f"got one that {'learns: ' + str(learning) if learning else 'an earlier stage has changed'}. Name the "
            "original's folder as `teacher.base`."
        )


def check_pictures(teacher: SampleSpec, student: SampleSpec) -> None:
    """Refuses a teacher that is to be shown pictures otherwise than the student.

    Args:
        teacher: What the teacher asks of its data.
        student: What the student does.

    Raises:
        UserError: If they differ.
    """
    apart = [name for name in PICTURE_FACTS if getattr(teacher, name) != getattr(student, name)]
    if apart:
        told = ", ".join(f"{name} {getattr(teacher, name)} and {getattr(student, name)}" for name in apart)
        raise UserError(
            f"Expected teacher and student to be shown pictures alike, got {told}. Give the student the teacher's "
            "tower and as many tokens of an image (`encoder.features.pool`, `projector.merge`)."
        )


def check_structures(teacher: MoELanguageModel, student: MoELanguageModel, terms: Sequence[DistillTerm]) -> None:
    """Refuses terms that compare layers which one of the models does not have.

    Args:
        teacher: Built.
        student: Built.
        terms: What is to be compared.

    Raises:
        UserError: If it is so.
    """
    layers = [sorted(model.num_experts) for model in (teacher, student)]
    if any(term.needs_routers for term in terms) and (layers[0] != layers[1] or not layers[0]):
        raise UserError(
            f"RouterTerm compares routers layer by layer, got routers in layers {layers[0]} of the teacher and "
            f"{layers[1]} of the student. Leave the term out."
        )
    if any(term.needs_attention for term in terms) and None in map(last_attention, (teacher.model, student.model)):
        raise UserError("AttentionTerm found no attention in the last layer of one of the models. Leave the term out.")
