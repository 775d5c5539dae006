"""Pictures by address: what is opened, what is refused, and that every wait has an end."""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers.tiny_world import picture

from moextend_pl.contracts import UserError
from moextend_pl.inference.pictures import fetch, open_picture, read_place
from moextend_pl.inference.sounds import open_sound
from moextend_pl.samples.pixels import decode_image


class Handler(BaseHTTPRequestHandler):
    """Serves a picture, a slow one, a large one, and ways to elsewhere."""

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        if self.path == "/none.png":
            self.send_error(404)
            return
        if self.path == "/trickle.png":  # a header that never ends
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            return
        body = {"/large.png": bytes(3000), "/page.png": b"<html>"}.get(self.path, picture(1))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            for place in range(len(body)) if self.path == "/slow.png" else ():
                self.wfile.write(body[place : place + 1])
                time.sleep(0.02)
            self.wfile.write(body if self.path != "/slow.png" else b"")
        except OSError:
            pass  # nobody waits for it any more

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_one_picture_is_the_same_from_wherever_it_comes(server: str, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(picture(1))
    inline = f"data:image/png;base64,{base64.b64encode(picture(1)).decode()}"
    expected = decode_image(picture(1), "").tobytes()
    places = (tmp_path / "picture.png", str(tmp_path / "picture.png"), inline, f"{server}/a.png", f"{server}/to//a.png")
    for place in places:
        assert open_picture(place).tobytes() == expected


def test_what_is_fetched_is_named_by_what_was_expected(server: str) -> None:
    assert read_place(f"{server}/to//tone.wav", "sound") == (picture(1), f"{server}/to//tone.wav")
    with pytest.raises(UserError, match="Expected a sound as a file, an `https://` or a `data:` address"):
        read_place(f"{server}/to/http://example.invalid/a.wav", "sound")
    with pytest.raises(UserError, match=r"a\.png: expected a sound as WAV, FLAC, MP3; it begins as none of them"):
        open_sound(f"{server}/a.png")


def test_other_kinds_of_addresses_are_never_opened_not_even_on_the_way(server: str, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(picture(1))
    elsewhere = ["http://example.invalid/a.png", f"file://{tmp_path}/picture.png", "ftp://127.0.0.1/a.png"]
    for address in (*elsewhere, *(f"{server}/to/{address}" for address in elsewhere)):
        with pytest.raises(UserError, match=r"Other kinds are never opened|cannot be fetched"):
            open_picture(address)
    for address in elsewhere[:1]:
        with pytest.raises(UserError, match="Other kinds are never opened"):
            open_picture(f"{server}/to/{address}")


def test_what_is_too_large_too_slow_or_no_picture_is_refused_in_one_sentence(server: str) -> None:
    with pytest.raises(UserError, match="at most 1000 bytes"):
        fetch(f"{server}/large.png", limit=1000)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"within 0\.3 seconds"):
        fetch(f"{server}/slow.png", patience=0.3)
    with pytest.raises(UserError, match="did not come within"):
        fetch(f"{server}/trickle.png", patience=0.3)
    assert time.monotonic() - begun < 1.0
    with pytest.raises(UserError, match="404"):
        open_picture(f"{server}/none.png")
    with pytest.raises(UserError, match="page.png: expected an image"):
        open_picture(f"{server}/page.png")
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("http://127.0.0.1:1/a.png")
    for address in ("data:image/png;base64,!!", "data:image/png", "data:image/png;base64,AAAA"):
        with pytest.raises(UserError):
            open_picture(address)
