"""The picture of the README is drawn again from any finished quickstart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "docs" / "picture.py"


@pytest.mark.slow
def test_the_picture_is_drawn_from_a_quickstart(quickstart: Path, tmp_path: Path) -> None:
    target = tmp_path / "picture.png"
    done = subprocess.run([sys.executable, SCRIPT, quickstart, target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(target) as picture:
        assert picture.size[0] > 1000
        assert len(picture.getcolors(1 << 24) or []) > 50
    assert target.stat().st_size <= 200_000
