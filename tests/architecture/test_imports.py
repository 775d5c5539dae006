"""Which room may know which: contracts <- everything, the core knows neither its data sets nor its callbacks."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from source import ROOMS, ROOT, imports, trees

FOUNDATION = "moextend_pl.contracts"
SAMPLES = "moextend_pl.samples"  # conversation -> tensors; it knows the contracts only
COMMANDS = ("moextend_pl/cli.py", "moextend_pl/stage_cli.py", "moextend_pl/__main__.py")


def project_imports(prefix: str) -> dict[str, set[str]]:
    """Returns, by file of a room, the names of this project that it imports."""
    found = {}
    for file, tree in trees().items():
        if file.startswith(prefix):
            found[file] = {name for name in imports(tree, file) if name.split(".")[0] in ROOMS}
    return found


def offences(prefix: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{file} imports {name}"
        for file, names in project_imports(prefix).items()
        for name in sorted(names)
        if name.startswith(forbidden)
    ]


def test_discovery_sees_imports_in_every_room() -> None:
    for room in ROOMS:
        assert any(project_imports(f"{room}/").values()), room


def test_contracts_import_nothing_of_the_project() -> None:
    assert project_imports("moextend_pl/contracts.py") == {"moextend_pl/contracts.py": set()}


def test_samples_know_only_the_contracts() -> None:
    assert project_imports("moextend_pl/samples/")
    wrong = [
        f"{file} imports {name}"
        for file, names in project_imports("moextend_pl/samples/").items()
        for name in names
        if not name.startswith((SAMPLES, FOUNDATION))
    ]
    assert wrong == []


def test_core_never_imports_datamodules_or_callbacks() -> None:
    assert offences("moextend_pl/", ("datamodules", "callbacks")) == []


def test_datamodules_know_only_contracts_and_samples_of_the_core() -> None:
    wrong = [
        f"{file} imports {name}"
        for file, names in project_imports("datamodules/").items()
        for name in names
        if not name.startswith(("datamodules", FOUNDATION, SAMPLES))
    ]
    assert wrong == []


def test_callbacks_never_import_datamodules() -> None:
    assert offences("callbacks/", ("datamodules",)) == []


def test_only_the_commands_import_the_command_line() -> None:
    names = ("moextend_pl.cli", "moextend_pl.stage_cli", "moextend_pl.__main__")
    # The first two run stages one after another, the last reads a stage as `fit` does.
    allowed = (*COMMANDS, "moextend_pl/quickstart", "moextend_pl/report", "moextend_pl/plan/stage_model")
    wrong = [line for room in ROOMS for line in offences(f"{room}/", names) if not line.startswith(allowed)]
    assert wrong == []


def test_no_import_cycles() -> None:
    modules = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in trees()}
    graph = {}
    for module, file in modules.items():
        # The packages' fronts hand out names of their own files; reading them is no dependency on the front.
        names = imports(trees()[file], file, with_types=False)
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = {name for name in targets if name in modules and name not in (module, *ROOMS)}
    assert sum(map(len, graph.values())) > 10
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("room", ROOMS)
def test_top_level_packages_are_this_repository(room: str) -> None:
    # `callbacks` and `datamodules` are common names: another distribution must not stand in for ours.
    origin = importlib.import_module(room).__file__
    assert origin is not None
    assert Path(origin).is_relative_to(ROOT / room)


def test_entry_point_is_short() -> None:
    assert len((ROOT / "moextend_pl/__main__.py").read_text().splitlines()) < 10
