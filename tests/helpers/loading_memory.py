"""Memory that loading a language model takes; run as a script: SMALL_BASE BASE HOW.

HOW is `none`, `nf4`, or `layers` or `experts`: of which this process holds the part of the first of four.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from moextend_pl.models.base_model import load_base
from moextend_pl.training.sharding.reading import Share

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
    options: dict[str, Any] = {"quantize": "nf4"} if asked == "nf4" else {}
    if asked in ("layers", "experts"):
        dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
        options["share"] = Share(init_device_mesh("cpu", (4,)), asked == "experts", {})
    load_base(small, **options)  # what is imported on the way is no part of a model
    before = anonymous_bytes()
    with Peak() as peak:
        model = load_base(base, **options)
    sys.stdout.write(f"{peak.bytes - before} {anonymous_bytes() - before}")
