"""Memory that loading a language model takes; run as a script: SMALL_BASE BASE QUANTIZE (`nf4` or `none`)."""

from __future__ import annotations

import resource
import sys
import threading
import time
from pathlib import Path

from moextend_pl.models.base_model import load_base

PAGE = resource.getpagesize()


def anonymous_bytes() -> int:
    """Returns the memory of this process that is no page of a file: files are mapped, and their pages can go."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * PAGE


class Peak:
    """Looks at the memory of the process again and again, in a thread of its own."""

    def __init__(self) -> None:
        self.bytes, self._done = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.0005)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


if __name__ == "__main__":
    small, base, asked = sys.argv[1:]
    quantize = None if asked == "none" else asked
    load_base(small, quantize)  # what is imported on the way is no part of a model
    before = anonymous_bytes()
    with Peak() as peak:
        model = load_base(base, quantize)
    sys.stdout.write(f"{peak.bytes - before} {anonymous_bytes() - before}")
