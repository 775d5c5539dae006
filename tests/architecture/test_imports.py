"""Which room may know which: arrows point up one list; the core knows neither its data sets nor its callbacks."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
from source import ROOMS, ROOT, cycles, import_graph, imports, trees

# A room imports from rooms above it only, imports inside functions and for types counted. Commands of the lower rooms
# are found by name.
ORDER = (
    "contracts",
    "samples",
    "moe",
    "runs",
    "training",
    "inference",
    "models",
    "distillation",
    "reports",
    "evaluation",
    "convert",
    "export",
    "cli",
    "plan",
    "quickstart",
    "extend",
)
FRONTS = ("__init__", "__main__")
FILES_IN_A_ROOM = 12
FOUNDATION = "moextend_pl.contracts"
SAMPLES = "moextend_pl.samples"  # conversation -> tensors; it knows the contracts only


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


def rooms_used() -> list[tuple[str, str, str]]:
    """Returns (file, its room, room it imports from) of every import inside the core."""
    used = []
    for file, names in project_imports("moextend_pl/").items():
        room = file.split("/")[1].removesuffix(".py")
        if room not in FRONTS:
            used += [(file, room, name.split(".")[1]) for name in names if name.startswith("moextend_pl.")]
    return used


def test_arrows_point_up_the_list_of_rooms() -> None:
    used = rooms_used()
    assert len(used) > 100
    # The front hands out names of all rooms: a file of the core that reads it knows rooms below its own.
    assert {target for _, _, target in used} <= set(ORDER)
    wrong = [f"{file} imports {target}" for file, room, target in used if ORDER.index(target) > ORDER.index(room)]
    assert wrong == []


def test_nothing_lies_flat_in_the_core_but_its_front_and_contracts() -> None:
    assert {path.stem for path in (ROOT / "moextend_pl").glob("*.py")} == {*FRONTS, "contracts"}


@pytest.mark.parametrize(
    "room", sorted({str(Path(file).parent) for file in trees() if file.startswith("moextend_pl/")})
)
def test_room_has_few_files_and_says_what_lives_there(room: str) -> None:
    files = [path for path in (ROOT / room).glob("*.py") if path.stem != "__init__"]
    assert len(files) <= FILES_IN_A_ROOM
    words = ast.get_docstring(trees()[f"{room}/__init__.py"])
    assert words is not None
    assert len(words.splitlines()) <= 4


def test_no_import_cycles() -> None:
    assert sum(map(len, import_graph().values())) > 100
    assert cycles() == []


@pytest.mark.parametrize("room", ROOMS)
def test_top_level_packages_are_this_repository(room: str) -> None:
    # `callbacks` and `datamodules` are common names: another distribution must not stand in for ours.
    origin = importlib.import_module(room).__file__
    assert origin is not None
    assert Path(origin).is_relative_to(ROOT / room)


def test_entry_point_is_short() -> None:
    assert len((ROOT / "moextend_pl/__main__.py").read_text().splitlines()) < 10
