"""Which faults are tried, and how do they end? `make faults`.

Runs every test that docs/faults.md names, slow ones too, and writes into the page how many cases of each row passed.
Signals come at TRIALS random moments, of which CI tries two. Exit code 1 if a test did not pass.

    python benchmarks/faults.py            # all rows
    python benchmarks/faults.py 9 10 14    # some of them
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROW = re.compile(r"^\| (\w+) \|.*\|([^|]*)\|$")
TRIALS = "20"
OUTCOMES = ("failed", "skipped", "passed")


def rows(page: str) -> dict[str, list[tuple[str, str]]]:
    """Returns the (file, test) of each row of the page that names any, by the row's id."""
    found = {match[1]: TEST.findall(line) for line in page.splitlines() if (match := ROW.match(line))}
    return {row: tests for row, tests in found.items() if tests}


def outcomes(report: Path) -> dict[tuple[str, str], Counter[str]]:
    """Counts passed, skipped and failed cases of each (file, test) in a report of pytest."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        test = (case.attrib["classname"].replace(".", "/") + ".py", case.attrib["name"].partition("[")[0])
        counts.setdefault(test, Counter())[outcome] += 1
    return counts


def told(page: str, counts: dict[tuple[str, str], Counter[str]]) -> str:
    """Returns the page with the counts in the last column of each row whose tests were run."""
    lines = []
    for line in page.splitlines():
        match, tests = ROW.match(line), TEST.findall(line)
        if match and tests and all(test in counts for test in tests):
            sums = sum((counts[test] for test in tests), Counter[str]())
            text = ", ".join(f"{sums[outcome]} {outcome}" for outcome in OUTCOMES if sums[outcome])
            line = f"{line[: match.start(2)]} {text} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def main(asked: Sequence[str]) -> int:
    """Returns the exit code of pytest."""
    page = PAGE.read_text(encoding="utf-8")
    known = rows(page)
    tests = sorted({test for row in asked or known for test in known[row]})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        nodes = [f"{file}::{test}" for file, test in tests]
        options = ["-q", "-m", "slow or not slow", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *nodes]
        environment = {"MOEXTEND_TRIALS": TRIALS, **os.environ}
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        page = told(page, outcomes(report))
    PAGE.write_text(page, encoding="utf-8")
    print("\n".join(line for line in page.splitlines() if ROW.match(line)))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
