"""The usage report of a model whose tower, projector and language model are all upcycled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from helpers.tiny_world import TinyWorld
from PIL import Image

from callbacks.train_only import TrainOnly
from callbacks.usage_report import UsageReport
from moextend_pl.contracts import UpcycleSpec
from moextend_pl.moe.upcycle import UpcycledMLP, upcycled_mlps

SPEC = UpcycleSpec(experts=4, top_k=2)


def count_selections(mlp: UpcycledMLP) -> torch.Tensor:
    """Returns counts (E,) that grow with every pass."""
    counts = torch.zeros(SPEC.experts, dtype=torch.long)

    def add(_gate: object, _inputs: object, output: tuple) -> None:
        for expert in output[2].flatten().tolist():
            counts[expert] += 1

    mlp.gate.register_forward_hook(add)
    return counts


def test_counts_of_all_three_parts_are_those_of_a_plain_count(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    model = tiny_world.cumo(encoder=SPEC, projector=SPEC, language=SPEC)
    parts = TrainOnly(["encoder", "projector", "language", "routers"])
    data = tiny_world.datamodule("mixed", val=tiny_world.data("mixed", "test"))
    make_trainer(parts, UsageReport(), steps=1).fit(model, data)
    usage = json.loads((tmp_path / "run" / "usage.json").read_text())
    expected = {
        name: [count_selections(mlp) for _, mlp in upcycled_mlps(getattr(model, name))]
        for name in ("encoder", "projector")
    }
    model.eval()
    tokens = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            model.projector(model.encoder(batch["pixel_values"]))
            tokens += int(batch["attention_mask"].sum())
    for part, layers in expected.items():
        assert list(usage[part]["all"].values()) == [counts.tolist() for counts in layers]
        assert usage[part]["image"] == usage[part]["all"]
    assert {sum(counts) for counts in usage["end"]["all"].values()} == {SPEC.top_k * tokens}
    for name in ("usage.png", "usage_encoder.png", "usage_projector.png"):
        with Image.open(tmp_path / "run" / "plots" / name) as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 10
