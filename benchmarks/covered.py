"""How much of the three packages do the tests run? `make coverage`, after tests with `--cov`.

Prints every file with lines or branches that no test runs, then each room; exit code 1 below 95 % of lines.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coverage import Coverage

LINES = 0.95
ROOT = Path(__file__).parents[1]
COUNTS = ("covered_lines", "num_statements", "covered_branches", "num_branches")


def rooms(files: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Adds up what coverage's JSON counts of files by room, and of all of them.

    Files outside of the repository (relative paths lie in it) are copies that tests made of it, changed ones too.
    """
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTS, 0))
    for file, facts in sorted(files.items()):
        if not (ROOT / file).is_relative_to(ROOT):
            continue
        for room in (str(Path(file).parent), "all"):
            for name in COUNTS:
                counts[room][name] += facts["summary"][name]
    return {**{room: row for room, row in counts.items() if room != "all"}, "all": counts["all"]}


def judge(counts: Mapping[str, Mapping[str, int]]) -> int:
    """Prints the rooms and returns the exit code.

    The total of `coverage report` mixes lines and branches; what is asked for is a share of lines.
    """
    for room, row in counts.items():
        lines = f"{row['covered_lines'] / max(row['num_statements'], 1):.1%} of {row['num_statements']} lines"
        print(f"{room:<28} {lines:<22} {row['covered_branches']} of {row['num_branches']} branches")
    total = counts["all"]
    if total["covered_lines"] < LINES * total["num_statements"]:
        print(f"FAILED: the tests run fewer than {LINES:.0%} of the lines", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """Reads what was recorded, prints it and returns the exit code."""
    recorded = Coverage(config_file=str(ROOT / "setup.cfg"))
    recorded.load()
    recorded.report(file=sys.stdout, include=[f"{ROOT}/*"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        recorded.json_report(outfile=str(path))
        return judge(rooms(json.loads(path.read_text(encoding="utf-8"))["files"]))


if __name__ == "__main__":
    sys.exit(main())
