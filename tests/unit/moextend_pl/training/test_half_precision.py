"""A run in `bf16-true`: what stays in fp32, and that its result can be loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from helpers.tiny_world import TinyWorld, make_plan
from PIL import Image
from transformers import AutoModelForCausalLM

from callbacks.expert_extension import ExpertExtension
from callbacks.outputs import SaveDelta
from callbacks.train_only import TrainOnly
from callbacks.usage_report import UsageReport
from moextend_pl.models.moextend import MoExtend
from moextend_pl.training.half_precision import apply_but_for, default_dtype, exact_places

PARTS = ["new_experts", "new_routers", "calibration", "projector"]


def test_run_in_bf16_answers_text_as_transformers_does_and_is_loaded_again(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    make_plan(init="copy", routing="masked").save(tmp_path / "plan.yaml")
    model = tiny_world.unbuilt()
    callbacks = [TrainOnly(PARTS), ExpertExtension(plan=str(tmp_path / "plan.yaml")), UsageReport(), SaveDelta()]
    make_trainer(*callbacks, steps=2, precision="bf16-true").fit(model, tiny_world.datamodule())
    assert model.language.model.model.rotary_emb.inv_freq.dtype == torch.float32
    loaded = MoExtend.load(tmp_path / "run")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    stock = AutoModelForCausalLM.from_pretrained(tiny_world.base, dtype=torch.bfloat16).eval()
    batch = tiny_world.batch(loaded, "ttt")
    with torch.no_grad():
        expected = stock(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert torch.equal(loaded.language(batch), expected)
        assert torch.equal(model.eval().language(batch), expected)
    assert isinstance(loaded.generate(Image.new("RGB", (32, 32)), "what is the color ?"), str)


def test_probe_runs_in_bf16(tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path) -> None:
    from moextend_pl.moe.selection import AllLayers

    trainer = make_trainer(TrainOnly(["routers"]), ExpertExtension(rule=AllLayers()), steps=1, precision="bf16-true")
    trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule())
    assert (tmp_path / "run" / "extension_plan.yaml").is_file()


def test_named_tensors_are_moved_and_not_cast() -> None:
    module = torch.nn.Module()
    with default_dtype(torch.bfloat16):
        module.weight = torch.nn.Parameter(torch.ones(2))
        module.bias = torch.nn.Parameter(torch.full((2,), 1 / 3, dtype=torch.float32))
        module.register_buffer("steps", torch.full((2,), 1 / 3, dtype=torch.float32))
        places = exact_places(module)
    assert [name for _, name in places] == ["bias", "steps"]
    assert exact_places(module) == []

    def to(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("meta", torch.float16 if tensor.is_floating_point() else None)

    apply_but_for(places, lambda: module._apply(to), to)
    assert (module.weight.dtype, module.weight.device.type) == (torch.float16, "meta")
    for tensor in (module.bias, module.steps):
        assert (tensor.dtype, tensor.device.type, tensor.shape) == (torch.float32, "meta", (2,))
