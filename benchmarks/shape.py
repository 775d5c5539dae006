"""The shape of the three packages in numbers: `make shape`.

Files, lines, functions, arguments, annotations, docstrings, import cycles, and tests against code.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "architecture"))

from source import Function, cycles, functions, line_count, own_arguments, trees  # noqa: E402


def quantiles(values: Sequence[int]) -> str:
    """Returns median, 90 % and the largest of some numbers."""
    nine_tenths = statistics.quantiles(values, n=10)[-1]
    return f"median {statistics.median(values):g}, 90 % {nine_tenths:g}, longest {max(values)}"


def lines_below(folder: str) -> int:
    """Returns the lines of a folder's Python files."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py"))


def documented(node: ast.AST) -> bool:
    """Tells whether a definition has a docstring."""
    return isinstance(node, Function | ast.ClassDef) and ast.get_docstring(node) is not None


def share(values: Sequence[bool]) -> str:
    """Returns how many are true."""
    return f"{sum(values)} of {len(values)} ({sum(values) / len(values):.1%})"


def main() -> None:
    """Prints the table."""
    sizes = {file: line_count(file) for file in trees()}
    found = [(name, node, method) for tree in trees().values() for name, node, method in functions(tree)]
    spans = [(node.end_lineno or node.lineno) - node.lineno + 1 for _, node, _ in found]
    arguments = [own_arguments(node, method) for _, node, method in found]
    public = [node for name, node, _ in found if not any(part.startswith("_") for part in name.split("."))]
    code, tests = sum(sizes.values()), lines_below("tests")
    rows = {
        "files": f"{len(sizes)}; lines a file: {quantiles(list(sizes.values()))}",
        "lines": f"{code:,}",
        "functions": f"{len(found)}; lines, docstring included: {quantiles(spans)}",
        "arguments": quantiles([len(items) for items in arguments]),
        "annotated arguments": share([item.annotation is not None for items in arguments for item in items]),
        "documented public functions": share([documented(node) for node in public]),
        "import cycles": str(len(cycles())),
        "tests": f"{tests:,} lines, {tests / code:.2f} for each line of code",
    }
    for name, text in rows.items():
        print(f"{name:<28} {text}")


if __name__ == "__main__":
    main()
