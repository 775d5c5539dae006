"""Files of remote folders: which schemes are allowed, and downloads that try again and prove what they brought.

Nothing here runs a shell: `fsspec` is asked for one of five schemes by name. A redirection is followed within its own
host, and to hosts that a user names, so that a foreign server cannot send a run to machines that only it can reach.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import SplitResult, urljoin, urlsplit

import fsspec

from moextend_pl.contracts import UserError

logger = logging.getLogger(__name__)

LOCAL = "file"
REMOTE = ("http", "https", "s3", "gs")
INSTALL = {"http": "fsspec[http]", "https": "fsspec[http]", "s3": "s3fs", "gs": "gcsfs"}
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
PIECE = 2**20
"""Bytes that are in memory at once while a file comes in."""

READ_AHEAD = 8 * 2**20
PLAIN_TRANSFER = {"Accept-Encoding": "identity"}
"""Compressed transfer would break sizes and resumed downloads, and shards do not shrink."""

USUAL_TEXT = 2**23
"""Bytes of a large index's text, by which its deadline is set."""

REDIRECTED = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 5
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
FINAL = (FileNotFoundError, PermissionError, ImportError)
"""Trying again does not help against these."""


class ShardError(UserError):
    """A whole shard or index cannot be used; no budget of bad samples covers that."""


@dataclass(frozen=True)
class StreamOptions:
    """How remote folders are read.

    Attributes:
        cache_dir: Folder that keeps what was downloaded; `~/.cache/moextend_pl` if None. Processes may share it.
        cache_gib: Largest size of that folder; what was not used for longest goes first.
        tries: How often one file is asked for before the run stops.
        timeout: Seconds without a single byte after which a try has failed.
        least_kib_s: KiB a second, over `timeout` seconds, below which a try has failed too; 0 for no such limit.
        redirect_hosts: Other hosts that a server may send to, as `cdn.example.org`, with an unusual `:port`.
    """

    cache_dir: str | None = None
    cache_gib: float = 50.0
    tries: int = 6
    timeout: float = 60.0
    least_kib_s: float = 16.0
    redirect_hosts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.least_kib_s < 0:
            raise UserError(f"Expected `least_kib_s` of at least 0, got {self.least_kib_s}.")
        if self.cache_gib <= 0 or self.tries < 1 or self.timeout <= 0:
            raise UserError(f"Expected `cache_gib` and `timeout` above 0 and at least 1 of `tries`, got {self}.")


def scheme_of(place: str) -> str:
    """Returns the scheme of a place, `file` where none is written.

    Raises:
        UserError: If the place is none that may be opened: `-`, `pipe:`, chains with `::`, or an unknown scheme.
    """
    match = SCHEME.match(place)
    scheme = match[1].lower() if match else LOCAL
    plain = match is None or place[match.end() :].startswith("//")
    if place == "-" or "::" in place or not plain or scheme not in (LOCAL, *REMOTE):
        allowed = ", ".join(f"{name}://" for name in (LOCAL, *REMOTE))
        raise UserError(
            f"Expected a folder or an address with one of {allowed}; got {place!r}, which is refused. Commands, "
            "standard input and other schemes are never opened."
        )
    return scheme


def download(address: str, target: Path, size: int, sha256: str, options: StreamOptions) -> None:
    """Fetches a file and proves that it is the expected one; goes on where a broken connection stopped.

    Args:
        address: Where it is.
        target: File to write; must not be the final name, since a killed process leaves half of it.
        size: Bytes that it has.
        sha256: Digest that it has, as hexadecimal text.
        options: How often to try, and how long to wait.

    Raises:
        ShardError: If it cannot be fetched, or is another file.
    """
    with target.open("wb") as out:
        brought = _Brought(out, size, address)

        def attempt() -> None:
            if brought.done == size:  # the connection broke behind the last byte, and there are none left to ask for
                return
            with _opened(address, brought.done, options, size - brought.done) as (stream, start):
                if start != brought.done:
                    brought.start_again()
                brought.take(_pieces(stream, options))

        try_again(attempt, address, options)
    if brought.digest.hexdigest() != sha256:
        raise ShardError(
            f"{address}: the index says sha256 {sha256}, the file that came has {brought.digest.hexdigest()}. It was "
            "changed after it was indexed; upload both again."
        )


def download_text(address: str, limit: int, options: StreamOptions) -> bytes:
    """Fetches a small file into memory.

    Raises:
        ShardError: If it cannot be fetched, or is larger than `limit` bytes.
    """
    found: list[bytes] = []

    def attempt() -> None:
        with _opened(address, 0, options, USUAL_TEXT) as (stream, _):
            taken, total = [], 0
            for piece in _pieces(stream, options):
                taken.append(piece)
                total += len(piece)
                if total > limit:
                    break
            found[:] = [b"".join(taken)]

    try_again(attempt, address, options)
    if len(found[0]) > limit:
        raise ShardError(f"{address}: expected at most {limit} bytes, got more. Is this an index of shards?")
    return found[0]


def try_again(
    attempt: Callable[[], None], address: str, options: StreamOptions, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Calls until it succeeds; waits twice as long each time, and by a random part less, so that ranks spread out.

    Raises:
        ShardError: If it never succeeds; names the address, and so the shard.
    """
    for number in range(1, options.tries + 1):
        try:
            return attempt()
        except ShardError:
            raise
        except Exception as error:  # every backend has exceptions of its own
            reason = str(error) or type(error).__name__
            if number == options.tries or _is_final(error):
                raise ShardError(f"{address}: cannot be fetched, tried {number} time(s): {reason}.") from error
            wait = min(FIRST_WAIT * 2 ** (number - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)
            logger.warning(
                "%s: try %d of %d failed (%s); again in %.1f s", address, number, options.tries, reason, wait
            )
            sleep(wait)
    raise AssertionError("unreachable: the last try returns or raises")


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, FINAL) or refused


class _Brought:
    """What has come of a file so far."""

    def __init__(self, out: BinaryIO, size: int, address: str) -> None:
        self.out = out
        self.address = address
        self.size = size
        self.done = 0
        self.digest = hashlib.sha256()

    def start_again(self) -> None:
        self.out.seek(0)
        self.out.truncate()
        self.done, self.digest = 0, hashlib.sha256()

    def take(self, pieces: Iterator[bytes]) -> None:
        for piece in pieces:
            if self.done + len(piece) > self.size:
                raise ShardError(
                    f"{self.address}: the index says {self.size} bytes, more came. Upload shard and index again."
                )
            try:
                self.out.write(piece)
            except OSError as error:
                raise ShardError(f"{self.out.name}: cannot be written: {error.strerror}. Free some space.") from error
            self.digest.update(piece)
            self.done += len(piece)
        if self.done != self.size:
            raise EOFError(f"the connection ended after {self.done} of {self.size} bytes")


def _pieces(stream: BinaryIO, options: StreamOptions) -> Iterator[bytes]:
    """Yields what comes; a server that sends a byte now and then, which no pause betrays, has failed."""
    begin, taken = time.monotonic(), 0
    while piece := stream.read(PIECE):
        yield piece
        taken += len(piece)
        seconds = time.monotonic() - begin
        if seconds < options.timeout:
            continue
        if taken < options.least_kib_s * 1024 * seconds:
            raise TimeoutError(f"{taken} bytes in {seconds:.0f} s, less than `least_kib_s` {options.least_kib_s:g}")
        begin, taken = time.monotonic(), 0


@contextmanager
def _opened(address: str, start: int, options: StreamOptions, expected: int) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a file for reading in one go, from a byte on if the place can do that; says from which.

    `expected` bytes set the deadline of the whole request, headers included, which may trickle too.
    """
    scheme = scheme_of(address)
    web = scheme in ("http", "https")
    try:
        system, path = fsspec.core.url_to_fs(address, **(_web_settings(options) if web else {}))
    except ImportError as error:
        raise ShardError(f"{address}: needs a package. Run `pip install {INSTALL[scheme]}`.") from error
    if not web:
        with system.open(path, "rb", block_size=READ_AHEAD, cache_type="readahead") as stream:
            stream.seek(start)
            yield stream, start
        return
    headers = {**PLAIN_TRANSFER, "Range": f"bytes={start}-"} if start else PLAIN_TRANSFER
    limit = _deadline(options, expected)
    for _ in range(MOST_REDIRECTS):
        # A stream of one request (block_size 0), not one request a block; `size` spares the question for it.
        with system.open(
            path, "rb", block_size=0, size=1, headers=headers, timeout=limit, allow_redirects=False
        ) as stream:
            if stream.r.status not in REDIRECTED:
                yield stream, start if stream.r.status == 206 else 0
                return
            path = redirected(path, stream.r.headers.get("Location", ""), options.redirect_hosts)
    raise ShardError(f"{address}: sent elsewhere {MOST_REDIRECTS} times. Correct the address.")


def redirected(address: str, target: str, hosts: Sequence[str]) -> str:
    """Returns where a server sends to, if that may be followed.

    Args:
        address: Who sends.
        target: As its answer names it; may be relative.
        hosts: Other hosts that may be sent to.

    Raises:
        ShardError: If it is another host, another port, or leaves https.
    """
    place = urljoin(address, target)
    old, new = urlsplit(address), urlsplit(place)
    schemes = ("https",) if old.scheme == "https" else ("http", "https")
    if new.scheme not in schemes or not (_host(new) == _host(old) or _host(new) in hosts):
        raise ShardError(
            f"{address}: sends to {new.scheme}://{new.netloc.rpartition('@')[2]}, which is refused. If you trust it, "
            f"name {_host(new)!r} in `reading.streaming.redirect_hosts`; from https only https is followed."
        )
    return place


def _host(parts: SplitResult) -> str:
    """Returns host and port, without the usual port of its scheme."""
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    return f"{parts.hostname}:{parts.port}" if parts.port not in (None, usual) else str(parts.hostname)


def _web_settings(options: StreamOptions) -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=options.timeout, sock_read=options.timeout)
    return {"client_kwargs": {"timeout": timeout}}


def _deadline(options: StreamOptions, expected: int) -> Any:
    """Returns the limits of one request."""
    import aiohttp

    total = options.timeout + expected / (1024 * options.least_kib_s) if options.least_kib_s else None
    return aiohttp.ClientTimeout(total=total, sock_connect=options.timeout, sock_read=options.timeout)
