"""How many operations does the forward pass of an extend step dispatch, losses included, and what asks for them?

    python benchmarks/launches.py --shape olmoe

Runs without a GPU: tensors are pretended ones of a CUDA device. Each operation counts one, views and empty tensors
none; the kernels of the experts of a layer count one. The step is that of `benchmarks/gpu.py`, not compiled.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from gpu import CASES, LENGTH, NEW, SEQUENCES, SHAPES, language_model
from harness import table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from moextend_pl.contracts import IGNORE_INDEX, TrainPlan
from moextend_pl.training.optim import apply_train_plan

FREE = (
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "detach", "alias",
    "as_strided", "permute", "unbind", "split", "split_with_sizes", "device", "empty", "new_empty", "empty_like",
)  # fmt: skip
WHOSE = ("moextend_pl/", "transformers/")


class Counted(TorchDispatchMode):
    """Counts operations by the file that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.causes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts it."""
        if func._schema.name.split("::")[1] not in FREE:
            self.causes[self._cause()] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _cause() -> str:
        frame = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            for owner in WHOSE:
                if owner in file:
                    return owner + file.split(owner)[-1]
            frame = frame.f_back  # type: ignore[assignment]
        return "other"


def put_on(module: nn.Module, device: str) -> None:
    """Gives every parameter and buffer an empty tensor on a device."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                there = torch.empty_like(value, device=device)
                part._parameters[name] = nn.Parameter(there, requires_grad=value.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else torch.empty_like(buffer, device=device)


def count(shape: str) -> Counter[str]:
    """Returns the operations of a forward pass by cause."""
    config = SHAPES[shape]
    model = language_model(config, True, CASES["extended"][1], "meta")
    apply_train_plan(model.parts(), TrainPlan(NEW))
    ids = torch.ones(SEQUENCES, LENGTH, dtype=torch.long)
    ids[:, : LENGTH // 4] = model.image_token_id
    labels = ids.masked_fill(torch.arange(LENGTH) < LENGTH * 7 // 8, IGNORE_INDEX)
    batch: Any = model.with_host_facts({
        "keys": ["a"] * SEQUENCES, "input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.empty(0), "image_keys": ["a"] * SEQUENCES,
    })  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_on(model.train(), "cuda")
        there = tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="cuda"), batch)
        there["known"] = type(batch["known"])(
            *tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="cuda"), list(batch["known"]))
        )
        width = config["hidden_size"]
        x = torch.empty(SEQUENCES, LENGTH, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        with Counted() as counted:
            model.losses(there, x)
    return counted.causes


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="olmoe")
    causes = count(parser.parse_args(argv).shape)
    rows = [{"asked for by": cause, "operations": number} for cause, number in causes.most_common()]
    print(table([*rows, {"asked for by": "all", "operations": causes.total()}]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
