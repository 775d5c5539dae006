"""What the kernels of experts keep for the backward pass, interpreted on a CPU, and what `plan` counts of it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.interpreted import answer, interpreted
from helpers.real_steps import make_step, saved_bytes
from helpers.tiny_world import build_tiny_world, tiny_mixtral, tiny_tokenizer

from moextend_pl.moe.dispatch import KERNEL_EXPERTS
from moextend_pl.plan.cost import memory

pytest.importorskip("triton")
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 8,
}  # fmt: skip
NEW = ["new_experts", "new_routers", "calibration"]
# In the upper half nothing below the new experts needs a gradient.
PARTS = {"extension": ["projector", *NEW], "upper half": NEW}


def kept_bytes() -> dict[str, list[float]]:
    """Returns for each case the bytes that are kept and the predicted ones."""
    with tempfile.TemporaryDirectory() as folder:
        world = build_tiny_world(Path(folder))
        tiny_mixtral(len(tiny_tokenizer()), **SIZES).save_pretrained(world.base)
        found = {}
        for name, parts in PARTS.items():
            unbuilt = lambda: world.unbuilt(experts_implementation=KERNEL_EXPERTS)  # noqa: E731
            step = make_step(world, parts, torch.bfloat16, unbuilt)
            assert all(layer.kernels for layer in step.shape.layers)
            predicted = memory(step.shape, replace(step.run, on_cpu=False)).activations
            found[name] = [saved_bytes(step.model, step.batch)[1], predicted]
    return found


@pytest.mark.slow
def test_what_kernels_keep_is_what_is_predicted(tmp_path: Path) -> None:
    found = interpreted(__file__, "kept_bytes", tmp_path)
    assert set(found) == set(PARTS)
    for name, (kept, predicted) in found.items():
        assert predicted == pytest.approx(kept, rel=0.04), name


if __name__ == "__main__":
    answer(globals())
