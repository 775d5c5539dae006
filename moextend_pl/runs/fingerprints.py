"""SHA-256 of files and tensors, and which tensors of a model are frozen."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from moextend_pl.runs.sharded import whole

# A wrapped router or experts module holds the base's own under this name, once for each extension.
WRAPPED = re.compile(r"(\.base)+(?=\.)")


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
