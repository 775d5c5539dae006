"""Files that hold no tensors, or hold them no longer, are refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.published import clip_tensors, convert
from safetensors.torch import save_file

from moextend_pl.contracts import UserError
from moextend_pl.convert.files import NO_TENSORS, TensorFiles


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def write_bin(path: Path) -> None:
    torch.save({"a": torch.ones(64)}, path)


def write_tensors(path: Path) -> None:
    save_file({"a": torch.ones(64)}, path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty.bin": lambda path: path.write_bytes(b""),
    "noise.bin": lambda path: path.write_bytes(b"\x00\x01noise" * 9),
    "text.txt": lambda path: path.write_text("a letter\n"),
    "short.bin": lambda path: (write_bin(path), truncate(path)),
    "short.safetensors": lambda path: (write_tensors(path), truncate(path)),
    "empty.safetensors": lambda path: path.write_bytes(b""),
    "object.bin": lambda path: torch.save({"a": {1, 2}}, path),
    "list.bin": lambda path: torch.save([torch.ones(2)], path),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_or_foreign_file_is_named(name: str, tmp_path: Path) -> None:
    DAMAGE[name](tmp_path / name)
    with pytest.raises(UserError, match=rf"^Expected tensors .*{name}") as caught:
        convert("cumo", tmp_path / name, tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NO_TENSORS)
def test_what_trainers_leave_beside_shards_is_passed_over_by_name(name: str, tmp_path: Path) -> None:
    write_bin(tmp_path / "model.bin")
    torch.save([1], tmp_path / name)
    assert set(TensorFiles(tmp_path)) == {"a"}


def test_other_file_without_tensors_in_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    write_bin(tmp_path / "model.bin")
    torch.save([1], tmp_path / "state.bin")
    with pytest.raises(UserError, match=r"state\.bin, got other objects"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("text", ["{", "3", ""])
def test_damaged_config_is_named(text: str, tmp_path: Path) -> None:
    write_bin(tmp_path / "model.bin")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"Expected a JSON object in .*config\.json"):
        convert("cumo", tmp_path, tmp_path / "run")


def test_truncated_tower_of_a_run_that_goes_back_is_named(tmp_path: Path) -> None:
    torch.save(clip_tensors(torch.Generator(), 0, "vision_model."), tmp_path / "clip.bin")
    convert("cumo", tmp_path / "clip.bin", tmp_path / "run", "--heads", "2")
    truncate(tmp_path / "run" / "encoder" / "encoder.safetensors")
    with pytest.raises(UserError, match=r"encoder\.safetensors .*could not read it"):
        convert("cumo", tmp_path / "run", tmp_path / "back", "--back")


def test_shape_and_type_are_told_of_both_kinds(tmp_path: Path) -> None:
    write_bin(tmp_path / "a.bin")
    write_tensors(tmp_path / "a.safetensors")
    files = [TensorFiles(tmp_path / name) for name in ("a.bin", "a.safetensors")]
    assert [(held.shape("a"), held.dtype("a")) for held in files] == [((64,), "torch.float32"), ((64,), "F32")]
