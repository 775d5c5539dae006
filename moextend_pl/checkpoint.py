"""What a run leaves behind: a small delta of new weights, and a manifest that says what it belongs to.

Every file is written beside its place and moved there whole, so that a run that is killed at any
moment leaves either the old file or the new one. The manifest comes last: a run directory with a
manifest is a finished run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moextend_pl.contracts import ExtensionPlan, UserError

if TYPE_CHECKING:
    from moextend_pl.module import MoExtend

DELTA_FILE, MANIFEST_FILE = "delta.safetensors", "manifest.json"
MANIFEST_SCHEMA = 2
PACKAGES = ("torch", "lightning", "transformers", "timm", "safetensors")
# A wrapped router or experts module holds the base's own under this name, once for each extension.
WRAPPED = re.compile(r"(\.base)+(?=\.)")
# Arguments of the model's parts that are folders; a manifest names them relative to its own.
FOLDERS = {"encoder": ("path", "name"), "language": ("base",)}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that it is there whole or not at all, also after a power cut.

    Args:
        path: The final place.
        write: Writes the content to the path it is given, in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process number keeps two runs from writing into one another's temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(run: Path) -> None:
    """Deletes what a process that was killed while it wrote has left in a run directory.

    Args:
        run: Directory that no other process writes to.
    """
    for leftover in run.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file so that it is there whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Writes plain data as JSON so that the file is there whole or not at all."""
    write_text(path, json.dumps(data, indent=1) + "\n")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written into their own folder and moved into place.

    Lightning writes to the system's temporary folder first and then copies where that lies on another
    file system; a run killed during the copy leaves half a checkpoint under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves a checkpoint.

        Args:
            checkpoint: Tensors and plain values.
            path: The final place, on a local file system.
            storage_options: Not supported, as in the base class.
        """
        assert storage_options is None, "storage_options is not supported for local checkpoints"
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as a hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's type, shape and bytes as a hexadecimal string."""
    value = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the SHA-256 of each tensor of the base by the name it has there, grown or not."""
    return {WRAPPED.sub("", name): tensor_sha256(tensor) for name, tensor in tensors.items()}


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters that do not learn, and the saved buffers of modules of which nothing learns."""
    tensors: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    saved = module.state_dict(keep_vars=True)
    for path, child in module.named_modules():
        if not any(parameter.requires_grad for parameter in child.parameters(recurse=False)):
            names = (f"{path}.{name}" if path else name for name, _ in child.named_buffers(recurse=False))
            tensors.update({name: saved[name] for name in names if name in saved})
    return tensors


@dataclass(frozen=True)
class Manifest:
    """What a delta belongs to.

    Attributes:
        plans: Extension plans of the model, first one first.
        model: Arguments of tower, projector and language model; folders relative to the run directory.
        trained: Names of the tensors that learned.
        frozen: SHA-256 of every tensor that did not, by its name in the base.
        delta_sha256: SHA-256 of the delta file.
        versions: Versions of Python and of the packages that matter.
        run: Where the manifest was read from.
    """

    plans: tuple[ExtensionPlan, ...]
    model: dict[str, dict[str, Any]]
    trained: list[str]
    frozen: dict[str, str]
    delta_sha256: str
    versions: dict[str, str]
    run: Path = field(default=Path(), compare=False)

    def save(self) -> None:
        """Writes the manifest into its run directory."""
        data = {"schema": MANIFEST_SCHEMA, **asdict(self), "plans": [plan.to_dict() for plan in self.plans]}
        data.pop("run")
        write_json(self.run / MANIFEST_FILE, data)

    def model_arguments(self) -> dict[str, dict[str, Any]]:
        """Returns the arguments of the three parts, with folders that can be opened from here."""
        arguments = {part: dict(values) for part, values in self.model.items()}
        for part in FOLDERS:
            if part not in arguments:
                raise UserError(
                    f"{self.run} holds no {part}; it can be the start of a stage, but not a model by itself."
                )
            arguments[part][_folder_name(arguments[part], part)] = str(self.folder(part))
        return arguments

    def folder(self, part: str) -> Path:
        """Returns the folder of `encoder` or `language`, as it can be opened from here."""
        return Path(os.path.normpath(self.run / self.model[part][_folder_name(self.model[part], part)]))

    def check_base(self, model: MoExtend) -> None:
        """Refuses a base whose tensors are not those that the run was trained on.

        Args:
            model: A built model.

        Raises:
            UserError: If a frozen tensor differs.
        """
        new = {name for name, _ in model.named_parameters()} - model.base_names()
        names = {WRAPPED.sub("", name): tensor for name, tensor in model.state_dict().items() if name not in new}
        for name, expected in self.frozen.items():
            got = tensor_sha256(names[name]) if name in names else "no such tensor"
            if got != expected:
                raise UserError(
                    f"{self.run}: the base has changed since this run was trained: {name} has SHA-256 {got[:12]}, "
                    f"the manifest says {expected[:12]}. Restore the base, or train the stage again."
                )


def _folder_name(arguments: Mapping[str, Any], part: str) -> str:
    return next(name for name in FOLDERS[part] if arguments.get(name))


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that matter."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _manifest_path(run: Path) -> Path:
    return (run if run.is_dir() else run.parent) / MANIFEST_FILE


def read_manifest(run: Path) -> Manifest:
    """Reads the manifest of a finished run.

    Args:
        run: Run directory, or a delta file in one.

    Raises:
        UserError: If there is none, or it is of another schema.
    """
    path = _manifest_path(run)
    if not path.is_file():
        raise UserError(f"Expected a finished run in {run}, found no {MANIFEST_FILE}. Run that stage to its end first.")
    names = ("model", "trained", "frozen", "delta_sha256", "versions")
    try:
        data = json.loads(path.read_text())
        if data.get("schema") != MANIFEST_SCHEMA:
            raise UserError(
                f"{path}: expected schema {MANIFEST_SCHEMA}, got {data.get('schema')!r}. Train the stage again."
            )
        plans = tuple(ExtensionPlan.from_dict(plan, origin=str(path)) for plan in data["plans"])
        return Manifest(plans=plans, run=path.parent, **{name: data[name] for name in names})
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}). Train the stage again.") from error


def save_delta(module: MoExtend, run: Path) -> Manifest:
    """Writes `delta.safetensors` and then `manifest.json`.

    The delta holds every parameter that is not in the base's files, or is but has learned.

    Args:
        module: The trained model.
        run: Run directory.

    Returns:
        The manifest.
    """
    base = module.base_names()
    parameters = dict(module.named_parameters())
    delta = {n: p.detach().cpu().contiguous() for n, p in parameters.items() if n not in base or p.requires_grad}
    write_atomically(run / DELTA_FILE, lambda path: save_file(delta, path))
    arguments = module.model_arguments()
    for part in FOLDERS:
        name = _folder_name(arguments[part], part)
        arguments[part][name] = os.path.relpath(arguments[part][name], run)
    manifest = Manifest(
        plans=module.plans,
        model=arguments,
        trained=[name for name, parameter in parameters.items() if parameter.requires_grad],
        frozen=fingerprints({name: t for name, t in frozen_tensors(module).items() if name not in delta}),
        delta_sha256=file_sha256(run / DELTA_FILE),
        versions=versions(),
        run=run,
    )
    manifest.save()
    return manifest


def load_delta(module: MoExtend, run: Path) -> None:
    """Reads the new weights of an earlier stage into a built model.

    Tensors that this model has and the delta lacks keep their fresh values if they are new ones of
    this stage; a tensor that the delta has must exist here.

    Args:
        module: The built model.
        run: Run directory, or a delta file in one.

    Raises:
        UserError: If the file is damaged or does not fit.
    """
    manifest = read_manifest(run)
    path = manifest.run / DELTA_FILE
    if not path.is_file() or file_sha256(path) != manifest.delta_sha256:
        raise UserError(f"{path}: missing or damaged (its SHA-256 is not the manifest's). Train the stage again.")
    delta, parameters = load_file(path), dict(module.named_parameters())
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
            parameters[name].copy_(tensor)
