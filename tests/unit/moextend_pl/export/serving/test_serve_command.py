"""What `serve` refuses before it loads a model."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moextend_pl import cli


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
@pytest.mark.parametrize("port", ["99999", "0", "taken"])
def test_an_address_that_is_not_free_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str, port: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = str(other.getsockname()[1]) if port == "taken" else port
        assert cli.main(["serve", str(tmp_path), "--host", host, "--port", number]) == 2
    assert f"Expected an address to listen at, got {host}:{number}" in capsys.readouterr().err
