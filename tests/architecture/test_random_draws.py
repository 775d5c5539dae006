"""Every random draw says on which device it happens: a run builds its model under the GPU as default device."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from source import ROOT

DRAWS = {"rand", "randn", "randint", "randperm", "normal"}
FOLDERS = ("moextend_pl", "datamodules", "callbacks", "benchmarks")


def unplaced(tree: ast.AST) -> Iterator[int]:
    """Yields the lines of draws and generators of torch that leave the device to the default."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if ast.unparse(node.func.value) != "torch":
            continue
        named = any(keyword.arg == "device" for keyword in node.keywords)
        if node.func.attr in DRAWS and not named:
            yield node.lineno
        if node.func.attr == "Generator" and not (named or node.args):
            yield node.lineno


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_random_draw_names_its_device(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [
        f"{path.relative_to(ROOT)}:{line}" for path in files for line in unplaced(ast.parse(path.read_text()))
    ] == []


def test_a_draw_on_the_default_device_is_found() -> None:
    drawn = "import torch\na = torch.randn(3)\nb = torch.Generator()\nc = torch.rand(2, device='cpu')\n"
    assert list(unplaced(ast.parse(drawn))) == [2, 3]
