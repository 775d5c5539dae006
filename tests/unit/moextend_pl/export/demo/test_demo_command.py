"""What `demo` refuses before it loads a model."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from moextend_pl import cli


def test_mistakes_are_one_sentence_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        assert cli.main(["demo", str(tmp_path), "--port", taken]) == 2
    assert f"Expected an address to listen at, got 127.0.0.1:{taken}" in capsys.readouterr().err
    assert cli.main(["demo", str(tmp_path), "--max-megabytes", "0"]) == 2
    assert "Expected `--max-megabytes` above 0" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "moextend_pl.export.demo.page", raising=False)
    assert cli.main(["demo", str(tmp_path), "--port", taken]) == 2
    assert 'pip install "moextend_pl[demo]"' in capsys.readouterr().err
