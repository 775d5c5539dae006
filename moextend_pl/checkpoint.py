"""What a run leaves behind: a small delta of new weights, and a manifest that says what it belongs to.

Every file is written beside its place and moved there whole, so that a run that is killed at any
moment leaves either the old file or the new one. The manifest comes last: a run directory with a
manifest is a finished run.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moextend_pl.atomic import write_atomically
from moextend_pl.contracts import UserError
from moextend_pl.fingerprints import WRAPPED, file_sha256, fingerprints, frozen_tensors
from moextend_pl.manifest import (
    Manifest,
    manifest_path,
    model_arguments,
    read_manifest,
    relative_arguments,
    versions,
)

if TYPE_CHECKING:
    from moextend_pl.module import MoExtend

DELTA_FILE = "delta.safetensors"


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

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Loads a checkpoint after comparing its bytes with the checksums in it, which torch does not do.

        Args:
            path: Where it lies.
            args: As in the base class.
            options: As in the base class.

        Returns:
            Tensors and plain values.

        Raises:
            UserError: If the file is damaged, or none of Lightning's.
        """
        try:
            with ZipFile(path) as file:
                damaged = file.testzip()
            checkpoint = {} if damaged else super().load_checkpoint(path, *args, **options)
        except (OSError, EOFError, BadZipFile, zlib.error, NotImplementedError, UnpicklingError, RuntimeError) as error:
            checkpoint, damaged = {}, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'}"
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            found = f"a damaged one ({damaged})" if damaged else "a file without `state_dict`"
            raise UserError(
                f"expected a checkpoint of Lightning at '{path}', got {found}. Give another `--ckpt_path`, or "
                "begin anew with `--fresh`."
            )
        return checkpoint


def delta_tensors(module: MoExtend) -> dict[str, Tensor]:
    """Returns what a run leaves behind by name: all that the base's files do not hold as it is now.

    That are new parameters, those of the base that learned, in this run or in one that it started from, and the
    saved buffers beside them.
    """
    base, frozen = module.base_names(), frozen_tensors(module)
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if name not in base or parameter.requires_grad or WRAPPED.sub("", name) in module.inherited:
            tensors[name] = parameter
    saved = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in saved and (name not in frozen or WRAPPED.sub("", name) in module.inherited):
            tensors[name] = buffer
    return tensors


def save_delta(module: MoExtend, run: Path) -> Manifest:
    """Writes `delta.safetensors` and then `manifest.json`.

    Args:
        module: The trained model.
        run: Run directory.

    Returns:
        The manifest.
    """
    parameters = dict(module.named_parameters())
    delta = {name: tensor.detach().cpu().contiguous() for name, tensor in delta_tensors(module).items()}
    write_atomically(run / DELTA_FILE, lambda path: save_file(delta, path))
    manifest = Manifest(
        plans=module.plans,
        model=relative_arguments(model_arguments(module), run),
        trained=[name for name, parameter in parameters.items() if parameter.requires_grad],
        frozen=fingerprints({name: t for name, t in frozen_tensors(module).items() if name not in delta}),
        delta_sha256=file_sha256(run / DELTA_FILE),
        versions=versions(),
        dtype=str(module.dtype).removeprefix("torch."),
        run=run,
    )
    manifest.save()
    return manifest


def inherited_names(run: Path) -> set[str]:
    """Returns the names that the tensors of a delta have in an ungrown base; empty if there is no delta.

    Args:
        run: Run directory, or a delta file in one.
    """
    path = manifest_path(run).with_name(DELTA_FILE)
    if not path.is_file():
        return set()
    with safe_open(path, "pt") as delta:
        return {WRAPPED.sub("", name) for name in delta.keys()}  # noqa: SIM118 - no dictionary


def load_delta(module: MoExtend, run: Path) -> set[str]:
    """Reads the new weights of an earlier stage into a built model.

    Tensors that this model has and the delta lacks keep their fresh values if they are new ones of
    this stage; a tensor that the delta has must exist here.

    Args:
        module: The built model.
        run: Run directory, or a delta file in one.

    Returns:
        The names that the tensors of the delta have in an ungrown base.

    Raises:
        UserError: If the file is damaged or does not fit, or the base is not the one it belongs to.
    """
    manifest = read_manifest(run)
    path = manifest.run / DELTA_FILE
    if not path.is_file() or file_sha256(path) != manifest.delta_sha256:
        raise UserError(f"{path}: missing or damaged (its SHA-256 is not the manifest's). Train the stage again.")
    delta, parameters = load_file(path), module.state_dict(keep_vars=True)
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
    manifest.check_base(module)
    return {WRAPPED.sub("", name) for name in delta}
