"""A hub of models on the loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few answers of a hub that downloads need; repositories are folders `org/name` of a root."""

    def __init__(self, root: Path, *arguments: object) -> None:
        self.root = root
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place = self.path.partition("?")[0].strip("/").split("/")
        if place[:2] == ["api", "models"]:
            folder = self.root / "/".join(place[2:4])
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            names = [str(file.relative_to(folder)) for file in files]
            facts: object = {"id": "/".join(place[2:4]), "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            if "tree" in place:
                facts = [{"type": "file", "path": name, "oid": name, "size": 1} for name in names]
            self.answer(json.dumps(facts).encode(), files != [])
        else:
            file = self.root / place[0] / place[1] / "/".join(place[4:])
            self.answer(file.read_bytes() if file.is_file() else b"", file.is_file())

    def answer(self, data: bytes, found: bool) -> None:
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hash(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def loopback_hub(root: Path) -> Iterator[str]:
    """Serves the repositories `org/name` of a folder; gives the address for `HF_ENDPOINT`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
