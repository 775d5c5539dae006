"""Limits that keep the code readable. An exception needs a reason here, and falls away when it is not needed."""

from __future__ import annotations

import ast

import pytest
from source import ROOMS, ROOT, Function, functions, line_count, own_arguments, trees

FILE_LINES, FILE_LINES_HARD = 300, 400
FUNCTION_LINES, FUNCTION_LINES_HARD = 40, 60
ARGUMENTS = 9
DOCSTRING_SHARE = 0.95
FORBIDDEN_NAMES = ("utils.py", "helpers.py", "misc.py", "common.py")

# "path" or "path::Class.function" -> why it may be longer than the soft limit, never than the hard one
LONGER: dict[str, str] = {}
# "path::Class.function" -> why it takes more arguments
MORE_ARGUMENTS: dict[str, str] = {}


def code_lines(node: Function) -> int:
    """Counts the lines of a function from `def` to its end that hold code; docstring, blanks and comments are free."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    header = range(node.lineno, node.body[0].lineno)
    lines = set(header)
    for statement in body:
        for child in ast.walk(statement):
            if isinstance(child, ast.stmt | ast.expr):
                lines.update(range(child.lineno, (child.end_lineno or child.lineno) + 1))
    return len(lines)


def all_functions() -> dict[str, tuple[Function, bool]]:
    found = {}
    for file, tree in trees().items():
        for name, node, is_method in functions(tree):
            found[f"{file}::{name}"] = (node, is_method)
    return found


def is_kernel(node: Function) -> bool:
    """Returns whether Triton compiles a function: its arguments are pointers and numbers, without types and many."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)


def too_large(sizes: dict[str, int], soft: int, hard: int) -> list[str]:
    return [f"{name}: {size}" for name, size in sizes.items() if size > (hard if name in LONGER else soft)]


@pytest.mark.parametrize("room", ROOMS)
def test_discovery_sees_every_room(room: str) -> None:
    files = [file for file in trees() if file.startswith(f"{room}/")]
    assert len(files) > 1
    assert sum(name.startswith(f"{room}/") for name in all_functions()) > 1


def test_files_fit_the_budget() -> None:
    assert too_large({file: line_count(file) for file in trees()}, FILE_LINES, FILE_LINES_HARD) == []


def test_functions_fit_the_budget() -> None:
    sizes = {name: code_lines(node) for name, (node, _) in all_functions().items()}
    assert too_large(sizes, FUNCTION_LINES, FUNCTION_LINES_HARD) == []


def test_functions_take_few_arguments() -> None:
    counts = {name: len(own_arguments(*found)) for name, found in all_functions().items() if not is_kernel(found[0])}
    excess = {name: count for name, count in counts.items() if count > ARGUMENTS and name not in MORE_ARGUMENTS}
    assert excess == {}


def test_exceptions_are_needed_and_have_a_reason() -> None:
    sizes = {name: code_lines(node) for name, (node, _) in all_functions().items()}
    needed = {file for file in trees() if line_count(file) > FILE_LINES}
    needed |= {name for name, size in sizes.items() if size > FUNCTION_LINES}
    counts = {name: len(own_arguments(*found)) for name, found in all_functions().items()}
    assert set(LONGER) <= needed
    assert set(MORE_ARGUMENTS) <= {name for name, count in counts.items() if count > ARGUMENTS}
    assert all(len(reason) > 10 for reason in (*LONGER.values(), *MORE_ARGUMENTS.values()))


def test_no_prints_and_no_star_imports() -> None:
    faults = []
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("print", "breakpoint")
            ):
                faults.append(f"{file}:{node.lineno}: {node.func.id}")
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                faults.append(f"{file}:{node.lineno}: star import")
    assert faults == []


def test_no_file_is_named_for_nothing_in_particular() -> None:
    assert [file for file in trees() if file.rsplit("/", 1)[-1] in FORBIDDEN_NAMES] == []


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by name, and takes the second for the first."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_every_torch_load_is_weights_only() -> None:
    faults = []
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load_from_checkpoint"):
                safe = {word.arg: word.value for word in node.keywords}.get("weights_only")
                if not (isinstance(safe, ast.Constant) and safe.value is True):
                    faults.append(f"{file}:{node.lineno}")
            if isinstance(node, ast.Import) and any(alias.name in ("pickle", "dill", "joblib") for alias in node.names):
                faults.append(f"{file}:{node.lineno}")
    assert faults == []


def test_every_argument_and_return_is_annotated() -> None:
    missing = []
    for name, (node, is_method) in all_functions().items():
        if is_kernel(node):
            continue
        arguments = own_arguments(node, is_method)
        starred = [item for item in (node.args.vararg, node.args.kwarg) if item is not None]
        missing += [f"{name}: {item.arg}" for item in (*arguments, *starred) if item.annotation is None]
        if node.returns is None:
            missing.append(f"{name}: return")
    assert missing == []


def test_public_names_have_docstrings() -> None:
    documented: dict[str, bool] = {}
    for file, tree in trees().items():
        documented[file] = ast.get_docstring(tree) is not None
        for holder in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
            prefix = "" if isinstance(holder, ast.Module) else f"{holder.name}."
            for node in holder.body:
                public = isinstance(node, Function | ast.ClassDef) and not f"{prefix}{node.name}".startswith("_")
                if public and not node.name.startswith("_"):
                    documented[f"{file}::{prefix}{node.name}"] = ast.get_docstring(node) is not None
    missing = [name for name, has in documented.items() if not has]
    assert len(documented) > 50
    assert len(missing) <= (1 - DOCSTRING_SHARE) * len(documented), missing
