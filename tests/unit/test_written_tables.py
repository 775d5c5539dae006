"""Benchmarks write their tables into the page, in the layout that stands there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TWO_PARTS = "# Page\n\n<!-- a.py -->\nold\nlines\n<!-- end -->\n\nbetween\n\n<!-- b.py -->\nother\n<!-- end -->\n"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def pages(benchmark: Any) -> Any:
    return benchmark("pages")


def test_only_the_marked_part_changes(pages: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(TWO_PARTS)
    pages.put(page, "a.py", r"new \1")
    assert page.read_text() == TWO_PARTS.replace("old\nlines", r"new \1")
    assert (pages.part(page, "a.py"), pages.part(page, "b.py")) == (r"new \1", "other")


@pytest.mark.parametrize("text", ["no mark", TWO_PARTS + TWO_PARTS])
def test_a_mark_that_does_not_stand_there_once_is_an_error(pages: Any, tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"one part 'a\.py'"):
        pages.put(page, "a.py", "new")
    assert page.read_text() == text


def block_rows(block: Any) -> list[dict[str, Any]]:
    """Rows as `block.py` measures them, the shares of the new expert and cases that the page leaves out among them."""
    sizes = [(dtype, e, k, t) for dtype in ("fp32", "bf16") for e, k, t in ((8, 2, 32), (8, 2, 2048), (64, 8, 32))]
    cases = (*block.ON_PAGE.values(), block.BASELINE)
    return [
        {"E": e, "k": k, "T": t, "dtype": dtype, "new": new, "case": case, "speed": 1 + n / 10, "kept": n / 10}
        for dtype, e, k, t in sizes
        for new in ("natural", 0.5)
        for n, case in enumerate(cases)
    ]


def step_rows(step: Any) -> list[dict[str, Any]]:
    names = [case.name for case in step.cases(step.Size())]
    return [
        {"dtype": dtype, "case": name, "speed": speed + n, "kept_MB": 10.4, "state_MB": 3.6, "GFLOP": 1.26}
        for dtype, speed in (("fp32", 1.0), ("bf16", 1.5))
        for n, name in enumerate(names)
    ]


def test_rows_of_a_block_stand_by_block_and_type(benchmark: Any) -> None:
    block = benchmark("block")
    rows = block.page_rows(block_rows(block))
    first = [(row["block"], row["type"], row["tokens"]) for row in rows]
    assert first == [
        ("8 experts, top 2", "fp32", 32), ("", "fp32", 2048), ("", "bf16", 32), ("", "bf16", 2048),
        ("64 experts, top 8", "fp32", 32), ("", "bf16", 32),
    ]  # fmt: skip
    assert [*rows[0].values()][3:] == ["1.00x", "1.10x", "1.20x", "1.30x", "1.40x", "0.00"]


def test_rows_of_a_step_hold_both_types(benchmark: Any) -> None:
    step = benchmark("step")
    rows = step_rows(step)
    assert [*step.page_rows(rows, step.Size())[1].values()][1:] == ["3.00x", "3.50x", "10 MB", "4 MB", "1.3"]
    assert step.page_rows(rows[:8], step.Size()) == []


@pytest.mark.parametrize("name", ["block", "step"])
def test_what_is_written_has_the_layout_of_the_page(
    benchmark: Any, pages: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    harness, script = benchmark("harness"), benchmark(name)
    page = tmp_path / "speed.md"
    page.write_text(pages.DOCS.joinpath("speed.md").read_text())
    monkeypatch.setattr(harness, "SPEED", page)
    monkeypatch.setattr(harness.sys, "argv", [f"benchmarks/{name}.py"])
    rows = (
        script.page_rows(block_rows(script)) if name == "block" else script.page_rows(step_rows(script), script.Size())
    )
    before = pages.part(page, f"{name}.py").splitlines()
    assert harness.finish("how fast?", {"all": rows}, script.parse("", ["--write"], on_page=True), rows) == 0
    after = pages.part(page, f"{name}.py").splitlines()
    assert after[:2] == before[:2]
    assert after[2:] != before[2:]
    assert {line.split("|")[1] for line in after} == {line.split("|")[1] for line in before}
    assert "\n".join(after) in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--quick"], ["--dtype", "fp32"]])
def test_small_sizes_are_not_written(benchmark: Any, option: list[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark("harness").parse("", ["--write", *option], on_page=True)


def test_a_benchmark_without_a_table_has_nothing_to_write(benchmark: Any) -> None:
    with pytest.raises(SystemExit):
        benchmark("harness").parse("", ["--write"])


@pytest.mark.slow
def test_page_of_many_gpus_is_what_its_command_writes(benchmark: Any, pages: Any) -> None:
    assert pages.part(pages.DOCS / "scale.md", "scale.py") == benchmark("scale").table()
