"""The project's source files as syntax trees, for the tests of this folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("moextend_pl", "datamodules", "callbacks")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees() -> dict[str, ast.Module]:
    """Returns every Python file of the three packages by its path from the root."""
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def line_count(name: str) -> int:
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, Function, bool]]:
    """Yields (qualified name, function, is a method) of every function, nested ones included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield f"{owner}{node.name}", node, isinstance(tree, ast.ClassDef)
            yield from functions(node, f"{owner}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{owner}{node.name}.")
        else:
            yield from functions(node, owner)


def own_arguments(node: Function, is_method: bool) -> list[ast.arg]:
    """Returns the arguments a caller gives, keyword-only ones included, `self` and `cls` not."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    static = any(isinstance(item, ast.Name) and item.id == "staticmethod" for item in node.decorator_list)
    return arguments[1:] if is_method and not static else arguments


def _nodes(tree: ast.AST, with_types: bool) -> Iterator[ast.AST]:
    """Yields every node, those under `if TYPE_CHECKING:` only on demand."""
    for node in ast.iter_child_nodes(tree):
        if with_types or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from _nodes(node, with_types)


def imports(tree: ast.Module, file: str, with_types: bool = True) -> Iterator[str]:
    """Yields the full name of everything a file imports, also inside of functions."""
    package = Path(file).parent.parts
    for node in _nodes(tree, with_types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def import_graph() -> dict[str, set[str]]:
    """Returns, by module, the modules of the three packages that it imports, those for types included."""
    modules = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in trees()}
    graph = {}
    for module, file in modules.items():
        names = imports(trees()[file], file)
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        # The packages' fronts hand out names of their own files; reading them is no dependency on the front.
        graph[module] = {name for name in targets if name in modules and name not in (module, *ROOMS)}
    return graph


def cycles() -> list[str]:
    """Returns every circle of imports that a walk through the modules meets, as `a -> b -> a`."""
    graph, done, found = import_graph(), set[str](), []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" -> ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    return found
