"""Lightning's checkpoint files, written whole or not at all, and read only if they are undamaged."""

from __future__ import annotations

import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import write_atomically


def peek(path: Path) -> dict[str, Any]:
    """Returns what a checkpoint holds without reading its tensors; nothing if it is damaged, or no single file."""
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, EOFError, UnpicklingError, RuntimeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
