"""Tensors of published checkpoints, read one at a time from one file or a folder of shards, and written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import write_atomically, write_json

SHARD_BYTES = 4 * 2**30
# What trainers leave beside the shards.
NO_TENSORS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name; safetensors are read lazily, `.bin` files are mapped into memory.

    Args:
        path: A `.safetensors` or `.bin` file, or a folder with shards of one kind.

    Raises:
        UserError: If there is no such file, one cannot be read, or a name stands in two files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where: dict[str, Path] = {}
        self._mapped: dict[Path, dict[str, Tensor]] = {}
        for file in self._files(path):
            for name in self._names(file):
                if name in self._where:
                    raise UserError(f"{name} stands in both {self._where[name]} and {file}. Remove one of them.")
                self._where[name] = file

    @staticmethod
    def _files(path: Path) -> list[Path]:
        if path.is_file():
            return [path]
        files = sorted(path.glob("*.safetensors"))
        files = files or sorted(file for file in path.glob("*.bin") if file.name not in NO_TENSORS)
        if not files:
            raise UserError(f"Expected a checkpoint (.safetensors or .bin) at {path}, found none. Correct the path.")
        return files

    def _names(self, file: Path) -> list[str]:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as tensors:
                    return list(tensors.keys())
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (SafetensorError, UnpicklingError, RuntimeError, ValueError, OSError, EOFError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"Expected tensors in {file} (.safetensors, or .bin as `torch.save` writes it), could not read it: "
                f"{reason}. Download or copy it anew, or name another file."
            ) from error
        if not isinstance(held, dict) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
            raise UserError(f"Expected tensors by name in {file}, got other objects. Move it out of the folder.")
        self._mapped[file] = held
        return list(held)

    def __getitem__(self, name: str) -> Tensor:
        file = self._where[name]
        if file in self._mapped:
            return self._mapped[file][name]
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading it."""
        file = self._where[name]
        if file in self._mapped:
            return tuple(self._mapped[file][name].shape)
        with safe_open(file, "pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Returns the type of a tensor without reading it: `F32`, or of a `.bin` file `torch.float32`."""
        file = self._where[name]
        if file in self._mapped:
            return str(self._mapped[file][name].dtype)
        with safe_open(file, "pt") as tensors:
            return str(tensors.get_slice(name).get_dtype())

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    @property
    def folder(self) -> Path:
        """Where the tensors lie."""
        return self.path if self.path.is_dir() else self.path.parent

    def config(self) -> dict[str, Any]:
        """Returns the `config.json` beside the tensors, or nothing.

        Raises:
            UserError: If it is damaged.
        """
        file = self.folder / "config.json"
        if not file.is_file():
            return {}
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"Expected a JSON object in {file}, got: {error}. Download or copy it anew.") from error


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a transformers checkpoint, `model.safetensors` or shards with their index."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def close() -> None:
        nonlocal pending, size
        write_tensors(pending, folder / f"model-{len(shards) + 1:05d}.safetensors")
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        pending[name] = tensor
        size += tensor.numel() * tensor.element_size()
        total += tensor.numel() * tensor.element_size()
        if size > shard_bytes:
            close()
    if pending:
        close()
    if len(shards) == 1:
        (folder / "model-00001.safetensors").replace(folder / "model.safetensors")
        return
    where = {name: f"model-{number:05d}.safetensors" for number, names in enumerate(shards, 1) for name in names}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes one file: safetensors, or what `torch.save` makes where the name ends in `.bin`."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if file.suffix == ".bin":
        write_atomically(file, lambda path: torch.save(whole, path))
    else:
        write_atomically(file, lambda path: save_file(whole, path, metadata={"format": "pt"}))
