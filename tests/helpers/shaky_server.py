"""A real HTTP server on the loopback that fails on demand."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread


class ShakyServer:
    """Serves the files of a folder.

    Attributes:
        url: Address of the folder.
        faults: File name -> what happens to its next requests, in order: `503`, `404`, `cut` (the connection breaks
            after half of what was asked for), `late` (it breaks behind the last byte, before the end is told), `slow`
            (a byte now and then), `slow head` (so too, and never a body), an address (it sends there).
        ranges: Whether parts of files can be asked for.
        requests: (file name, first byte, bytes sent) of all requests, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.ranges = True
        self.requests: list[tuple[str, int, int]] = []
        self.url = ""
        self.lock = Lock()

    def next_fault(self, name: str) -> str:
        with self.lock:
            faults = self.faults.get(name, [])
            return faults.pop(0) if faults else ""


@contextmanager
def shaky_server(folder: Path) -> Iterator[ShakyServer]:
    """Runs a server in a thread."""
    state = ShakyServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            fault = state.next_fault(name)
            path = state.folder / name
            if fault in ("503", "404") or not path.is_file():
                self.send_response(int(fault or 404))
                self.send_header("Content-Length", "0")
                self.end_headers()
                state.requests.append((name, 0, 0))
                return
            if "/" in fault:
                self.send_response(302)
                self.send_header("Location", fault)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "slow head":
                self.trickle(b"HTTP/1.1 200 OK\r\n" + b"X-Name: value\r\n" * 40)
                return
            data = path.read_bytes()
            asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked and state.ranges else 0
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start + (fault == "late")))
            self.end_headers()
            data = data[start : start + (len(data) - start) // 2] if fault == "cut" else data[start:]
            state.requests.append((name, start, len(data)))
            if fault == "slow":
                self.trickle(data)
                return
            self.wfile.write(data)
            if fault in ("cut", "late"):
                self.wfile.flush()
                time.sleep(0.2)  # what has arrived together with the end of the connection may be lost
                self.close_connection = True

        def trickle(self, data: bytes) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):  # the other side had enough
                for place in range(len(data)):
                    self.wfile.write(data[place : place + 1])
                    time.sleep(0.05)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/set"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
