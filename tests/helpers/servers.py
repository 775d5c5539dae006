"""Servers that a test starts as processes of their own."""

from __future__ import annotations

import socket
import subprocess
import time
from urllib.error import URLError
from urllib.request import urlopen


def free_port() -> int:
    """Returns a port of this machine at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(address: str, process: subprocess.Popen[bytes], patience: float = 240.0) -> None:
    """Waits until a process answers at an address.

    Raises:
        AssertionError: If it ends before, or takes longer than so many seconds.
    """
    end = time.monotonic() + patience
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(address):
                return
        except URLError:
            time.sleep(0.5)
    raise AssertionError(f"nothing at {address}; exit code {process.poll()}")
