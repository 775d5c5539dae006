"""What a trained model leaves behind: a small delta of new weights, and a manifest that says what it belongs to.

Every file is written beside its place and moved there whole, so that a run that is killed at any
moment leaves either the old file or the new one. The manifest comes last: a run directory with a
manifest is a finished run.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moextend_pl.contracts import ExtensionPlan, UserError
from moextend_pl.inference.spec import GenerationSpec
from moextend_pl.models.base_model import ComputeSpec
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.projector import Projector
from moextend_pl.models.tower import FeatureSpec
from moextend_pl.moe.parallel.cut import of_whole, take_values
from moextend_pl.runs.fingerprints import WRAPPED, fingerprints, frozen_tensors, tensor_sha256
from moextend_pl.runs.manifest import (
    DELTA_FILE,
    NEW_DELTA_FILE,
    Manifest,
    hub_names,
    manifest_path,
    read_manifest,
    relative_arguments,
    versions,
)
from moextend_pl.runs.numbers import check_finite
from moextend_pl.runs.sharded import whole
from moextend_pl.training.language_losses import RouterWeights
from moextend_pl.training.stage import StageModule, shapes_only

log = logging.getLogger(__name__)


class DeltaModule(StageModule):
    """A whole of three parts, most of whose weights lie in files of their own; the rest is its delta.

    Attributes:
        inherited: Names, in the ungrown base, of the tensors that came from an earlier stage's delta.
    """

    encoder: VisionEncoder
    projector: Projector
    language: MoELanguageModel
    inherited: set[str]

    @property
    @abstractmethod
    def plans(self) -> tuple[ExtensionPlan, ...]:
        """The extension plans of the built model, first one first."""

    @abstractmethod
    def base_names(self) -> set[str]:
        """Returns the names of the parameters that the base's own files hold; all others are new."""

    def scaffold_names(self) -> set[str]:
        """Returns the names of parameters that serve training alone, and that no delta holds."""
        return set()

    def upcyclable(self) -> dict[str, VisionEncoder | Projector | MoELanguageModel]:
        """Returns the parts whose MLPs may become experts."""
        return {"encoder": self.encoder, "projector": self.projector, "language": self.language}


def model_arguments(model: DeltaModule) -> dict[str, dict[str, Any]]:
    """Returns what `MoExtend.load` needs to build the three parts again; folders as they are named now.

    Args:
        model: Any, built or not.

    Raises:
        UserError: If the language model has no base to be read again.
    """
    language = model.language
    if language.base is None:
        raise UserError("Expected `language.base`, so that the run can be loaded again.")
    arguments: dict[str, dict[str, Any]] = {
        "encoder": model.encoder.rebuild_arguments(),
        "projector": model.projector.rebuild_arguments(),
        "language": {
            "base": language.base,
            "tokenizer": language.tokenizer_path,
            "chat_template": language.chat_template,
            "experts_implementation": language.compute.experts_implementation,
            "quantize": language.compute.quantize,
            "balance_weight": language.router_losses.balance,
            "max_new_tokens": language.generation.max_new_tokens,
            "dense": language.dense,
        },
    }
    hearing = getattr(model, "hearing", None)
    for name, part in model.upcyclable().items():
        arguments[name]["upcycle"] = asdict(part.upcycle_spec) if part.upcycle_spec else None
    return arguments if hearing is None else {**arguments, "hearing": hearing.rebuild_arguments()}


def encoder_arguments(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a tower whose options stand side by side, as in a manifest.

    Args:
        facts: Options by name, those of groups included.
    """
    return _grouped(facts, {"features": (FeatureSpec, {})})


def language_arguments(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a language model whose options stand side by side, as in a manifest.

    Args:
        facts: Options by name, those of groups included.
    """
    losses = {"balance": "balance_weight", "z": "z_weight", "choices": "balance_choices"}
    groups = {
        "router_losses": (RouterWeights, losses),
        "compute": (ComputeSpec, {}),
        "generation": (GenerationSpec, {}),
    }
    return _grouped(facts, groups)


def _grouped(facts: Mapping[str, Any], groups: Mapping[str, tuple[Any, dict[str, str]]]) -> dict[str, Any]:
    """Puts options into their groups: group -> (its class, names of its fields among the options where they differ)."""
    arguments = dict(facts)
    for group, (kind, names) in groups.items():
        known = {field.name: names.get(field.name, field.name) for field in fields(kind)}
        given = {field: arguments.pop(name) for field, name in known.items() if name in arguments}
        if given:
            arguments[group] = kind(**given)
    return arguments


def delta_tensors(module: DeltaModule) -> dict[str, Tensor]:
    """Returns what a run leaves behind by name: all that the base's files do not hold as it is now.

    That are new parameters, those of the base that learned in any run up to this one, and saved buffers beside them.
    """
    base, frozen, scaffold = module.base_names(), frozen_tensors(module), module.scaffold_names()
    tensors: dict[str, Tensor] = {}
    for name, p in module.named_parameters():
        if name not in scaffold and (name not in base or p.requires_grad or WRAPPED.sub("", name) in module.inherited):
            tensors[name] = p
    saved = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in saved and (name not in frozen or WRAPPED.sub("", name) in module.inherited):
            tensors[name] = buffer
    return tensors


def save_delta(module: DeltaModule, run: Path, writes: bool = True) -> Manifest:
    """Writes `delta.safetensors` and `manifest.json`, which change as one; all ranks meet here if the model is sharded.

    Args:
        module: The trained model.
        run: Run directory.
        writes: Whether this rank writes.

    Returns:
        The manifest.

    Raises:
        UserError: If something that was learned is NaN or infinite.
    """
    parameters = dict(module.named_parameters())
    delta = {name: whole(tensor).cpu().contiguous() for name, tensor in delta_tensors(module).items()}
    check_finite(delta, "what was learned", "Nothing was written. Lower `optim.lr`.")
    arguments = model_arguments(module)
    manifest = Manifest(
        plans=module.plans,
        model=relative_arguments(arguments, run),
        trained=[name for name, p in parameters.items() if p.requires_grad and name not in module.scaffold_names()],
        frozen=fingerprints({name: t for name, t in frozen_tensors(module).items() if name not in delta}),
        delta_sha256="",  # of what is written now
        versions=versions(),
        dtype=str(module.dtype).removeprefix("torch."),
        sources=module.sources()["files"],
        bases=hub_names(arguments),
        run=run,
    )
    return manifest.save_with(lambda path: save_file(delta, path)) if writes else manifest


def check_start(module: DeltaModule, run: Path) -> None:
    """Refuses an earlier stage that is not there, or whose base or tower was configured otherwise than this one's.

    Args:
        module: Built or not.
        run: Run directory, or a delta file in one.

    Raises:
        UserError: If it is so, before any weight is read.
    """
    read_manifest(run).check_sources(module.sources()["files"])


def inherited_names(run: Path) -> set[str]:
    """Returns the names that the tensors of a delta have in an ungrown base; empty if there is no delta.

    Args:
        run: Run directory, or a delta file in one.
    """
    folder = manifest_path(run).parent
    if not any((folder / name).is_file() for name in (DELTA_FILE, NEW_DELTA_FILE)):
        return set()
    with safe_open(read_manifest(folder).delta(), "pt") as delta:
        return {WRAPPED.sub("", name) for name in delta.keys()}  # noqa: SIM118 - no dictionary


def load_delta(module: DeltaModule, run: Path) -> set[str]:
    """Reads the new weights of an earlier stage into a built model.

    Tensors that this model has and the delta lacks keep their fresh values if they are new ones of
    this stage; a tensor that the delta has must exist here.

    Args:
        module: The built model; one of shapes alone takes no values, and finds out names only.
        run: Run directory, or a delta file in one.

    Returns:
        The names that the tensors of the delta have in an ungrown base.

    Raises:
        UserError: If the file is damaged or does not fit, or the base is not the one it belongs to.
    """
    if shapes_only():
        return inherited_names(run)
    manifest = read_manifest(run)
    path = manifest.delta()
    delta, parameters = load_file(path), module.state_dict(keep_vars=True)
    check_finite(delta, str(path), "Train the stage again.")
    unknown = [
        name for name, tensor in delta.items() if name not in parameters or parameters[name].shape != tensor.shape
    ]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} tensors do not fit this model, for example {unknown[0]}. Expected the delta of a "
            "run with the same parts and extension plan."
        )
    with torch.no_grad():
        for name, tensor in delta.items():
            take_values(parameters[name], tensor)
    check_base(manifest, module)
    return {WRAPPED.sub("", name) for name in delta}


def check_base(manifest: Manifest, model: DeltaModule) -> None:
    """Refuses a base whose tensors are not those that the run was trained on.

    Of a base that is read in a shorter type, or in 4 bits where it was not, nothing can be said.

    Args:
        manifest: Of the run whose delta was read.
        model: A built model.

    Raises:
        UserError: If a frozen tensor differs.
    """
    shorter = torch.get_default_dtype().itemsize < manifest.torch_dtype.itemsize
    if shorter or manifest.model.get("language", {}).get("quantize") != model.language.compute.quantize:
        log.warning("%s: its base was of another type, so that it cannot be compared with the one here", manifest.run)
        return
    new = {name for name, _ in model.named_parameters()} - model.base_names()
    state = model.state_dict(keep_vars=True)
    here = {WRAPPED.sub("", name): tensor for name, tensor in state.items() if name not in new}
    for name, expected in manifest.frozen.items():
        if name not in here or not _is_or_rounds_to(manifest, here[name], expected):
            got = _sha256(here[name])[:12] if name in here else "no such tensor"
            raise UserError(
                f"{manifest.run}: the base has changed since this run was trained: {name} has SHA-256 {got}, "
                f"the manifest says {expected[:12]}. Restore the base, or train the stage again."
            )


def _is_or_rounds_to(manifest: Manifest, tensor: Tensor, expected: str) -> bool:
    if _sha256(tensor) == expected:
        return True
    # A tower is read in its own type first.
    longer = tensor.is_floating_point() and tensor.dtype.itemsize > manifest.torch_dtype.itemsize
    return longer and tensor_sha256(tensor.to(manifest.torch_dtype)) == expected


def _sha256(tensor: Tensor) -> str:
    known = of_whole(tensor)
    return tensor_sha256(tensor) if known is None else known.sha256
