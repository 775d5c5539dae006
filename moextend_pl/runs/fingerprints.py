"""What weights are: SHA-256 of files and tensors, which of a model are frozen, and whether their files are whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moextend_pl.contracts import UserError
from moextend_pl.runs.sharded import whole

# A wrapped router or experts module holds the base's own under this name, once for each extension.
WRAPPED = re.compile(r"(\.base)+(?=\.)")
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000  # bytes; safetensors itself reads no longer one
ADVICE = "Download or copy it again."


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as a hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's type, shape and bytes as a hexadecimal string; of a sharded one as a whole."""
    value = whole(tensor).cpu().contiguous()
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


def check_weights(folder: Path) -> None:
    """Refuses the weights of a transformers model that are missing, cut short or pickled.

    Args:
        folder: With `model.safetensors`, or its shards and their index.

    Raises:
        UserError: If it is so; names the file.
    """
    if (folder / WEIGHTS_FILE).is_file():
        check_weight_file(folder / WEIGHTS_FILE)
        return
    if not (folder / INDEX_FILE).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        raise UserError(
            f"Expected {WEIGHTS_FILE} in {folder}, found "
            + (f"only {others[0]}, which is pickled and never opened. " if others else "no weights. ")
            + "Take the model's safetensors files, or run the stage that makes it."
        )
    shards: dict[str, set[str]] = {}
    for name, file in _index(folder / INDEX_FILE).items():
        shards.setdefault(file, set()).add(name)
    for file, names in shards.items():
        if lacking := names - check_weight_file(folder / file):
            raise UserError(
                f"{folder / file}: expected the {len(names)} tensors that {INDEX_FILE} places there, it lacks "
                f"{len(lacking)}, for example {min(lacking)}. {ADVICE}"
            )


def _index(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in places.values()):
            raise ValueError("a shard that is not named by a file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}). {ADVICE}") from error
    return dict(places)


def check_weight_file(path: Path) -> set[str]:
    """Refuses a safetensors file that is missing, cut short, or tells of more than it holds.

    Args:
        path: The file.

    Returns:
        The names of its tensors.

    Raises:
        UserError: If it is so.
    """
    if not path.is_file():
        raise UserError(f"Expected weights in {path}, found no file. {ADVICE}")
    try:
        with path.open("rb") as file:
            length, held = int.from_bytes(file.read(8), "little"), path.stat().st_size - 8
            if not 0 < length <= min(held, HEADER_LIMIT):
                raise ValueError(f"a header of {length} bytes in a file of {held + 8}")
            header: dict[str, Any] = json.loads(file.read(length))
        names = header.keys() - {"__metadata__"}
        end = max((int(header[name]["data_offsets"][1]) for name in names), default=0)
        if end != held - length:
            raise ValueError(f"tensors of {end} bytes announced, {held - length} bytes there")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}). {ADVICE}") from error
    return set(names)
