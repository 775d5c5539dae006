"""A step whose loss or gradient is not finite is skipped, and no file ever holds what is not."""

from __future__ import annotations

import copy
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data_options import grouped
from helpers.poison import EMBEDDING, Poison
from helpers.tiny_world import TinyWorld, image_entry, make_plan
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file, save_file
from torch import nn

from callbacks.checkpoints import StageCheckpoint
from callbacks.expert_extension import ExpertExtension
from callbacks.outputs import SaveDelta, StageReceipt
from callbacks.train_only import TrainOnly
from datamodules import ImageTextShards
from datamodules.shards import Entry, write_shards
from moextend_pl.contracts import TrainPlan, UserError
from moextend_pl.models.delta import save_delta
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.selection import ShiftRule
from moextend_pl.runs.numbers import non_finite
from moextend_pl.training.finite import NumbersGuard, Outputs, largest
from moextend_pl.training.optim import OptimSpec

NEW = ["projector", "new_experts", "new_routers", "calibration"]
GATE = "language.model.model.layers.2.mlp.gate.new_rows"


class Film(Callback):
    """Keeps weights, buffers and state of the optimizer after each batch."""

    def __init__(self) -> None:
        self.pictures: list[tuple[dict[str, torch.Tensor], dict[int, Any]]] = []
        self.keys: list[list[str]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        self.pictures.append((weights, copy.deepcopy(trainer.optimizers[0].state_dict()["state"])))
        self.keys.append(batch["keys"])

    def is_still(self, step: int) -> bool:
        """Tells whether a step left everything as it was."""
        (before, moments_before), (after, moments) = self.pictures[step - 1 : step + 1]
        same = [moments.keys() == moments_before.keys()]
        same += [torch.equal(after[name], before[name]) for name in before]
        same += [torch.equal(moments[n][name], old[name]) for n, old in moments_before.items() for name in old]
        return all(same)


def extended(world: TinyWorld, lr: float = 0.01) -> MoExtend:
    model = world.unbuilt()
    model.optim = OptimSpec(lr=lr)
    model.extension_plan = make_plan()
    return model


class WithSGD(MoExtend):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1, momentum=0.9)


def first_new_row(model: MoExtend) -> str:
    return next(name for name, p in model.named_parameters() if p.requires_grad and "layers.2" in name)


@pytest.mark.parametrize("optimizer", ["one call", "masters", "any other"])
@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_without_finite_numbers_leaves_weights_and_moments_as_they_were(
    tiny_world: TinyWorld, make_trainer: Callable, caplog: Any, optimizer: str, gradient: bool, mixed: bool
) -> None:
    model, film = extended(tiny_world), Film()
    if optimizer == "any other":
        model.__class__ = WithSGD
    model.train_plan = TrainPlan(tuple(NEW))
    model.configure_model()
    place = first_new_row(model) if gradient else EMBEDDING
    precision = "bf16-true" if optimizer == "masters" else "bf16-mixed" if mixed else "32-true"
    options = {"steps": 6, "precision": precision, "gradient_clip_val": 1.0}
    with caplog.at_level(logging.WARNING, "moextend_pl.training.finite"):
        trainer = make_trainer(Poison([2, 3], place, gradient), film, **options)
        trainer.fit(model, tiny_world.datamodule())
    assert [film.is_still(step) for step in range(1, 6)] == [False, True, True, False, False]
    (first, second) = [record.getMessage() for record in caplog.records]
    assert first.startswith(f"step 2: {'a gradient' if gradient else 'the loss'} is not finite, from the gradient of ")
    assert f"samples {', '.join(film.keys[2])}; the step is skipped" in first
    if gradient:
        assert f"from the gradient of {place} on" in first
    else:  # watched by then: the poison is put on after the watch
        assert re.search(r"step 3: the loss is not finite, from the output of language\.model\.\S+ on", second)
    states = trainer.optimizers[0].state_dict()["state"].values()
    if optimizer != "any other":
        assert {int(state["step"]) for state in states} == {4}


def test_statistics_of_batch_normalisation_are_taken_back_too(tiny_world: TinyWorld, make_trainer: Callable) -> None:
    model, film = VisionEncoder(path=str(tiny_world.encoder), tokenizer=str(tiny_world.base), embedding_dim=8), Film()
    make_trainer(Poison([1], "tower.conv1.0"), film, steps=3).fit(model, tiny_world.datamodule("vqa"))
    assert any(name.endswith("running_mean") for name in film.pictures[0][0])
    assert [film.is_still(step) for step in (1, 2)] == [True, False]
    assert non_finite(film.pictures[2][0]) == []


def test_one_batch_of_an_accumulated_step_is_enough_to_skip_it(
    tiny_world: TinyWorld, make_trainer: Callable, caplog: Any
) -> None:
    film = Film()
    parts = [TrainOnly(NEW), Poison([1], first_only=True), film]
    with caplog.at_level(logging.WARNING, "moextend_pl.training.finite"):
        make_trainer(*parts, steps=3, accumulate_grad_batches=2).fit(extended(tiny_world), tiny_world.datamodule())
    assert [film.is_still(batch) for batch in (1, 2, 3, 5)] == [False, True, True, False]
    (record,) = caplog.records
    assert "the loss is not finite" in record.getMessage()
    assert f"samples {', '.join(film.keys[2] + film.keys[3])}; " in record.getMessage()


@pytest.mark.parametrize("guard", [[], [NumbersGuard(2)]], ids=["by default", "as asked"])
def test_some_in_a_row_end_the_run_and_nothing_is_written(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path, guard: list[Callback]
) -> None:
    row = 2 if guard else 3
    writers = [SaveDelta(), StageReceipt(["delta.safetensors"]), StageCheckpoint(1)]
    trainer = make_trainer(
        TrainOnly(NEW), Poison(list(range(2, 9))), *guard, *writers, steps=9, enable_checkpointing=True
    )
    with pytest.raises(
        UserError, match=rf"got {row} steps in a row without; step {row + 1}: the loss is not .*samples"
    ):
        trainer.fit(extended(tiny_world), tiny_world.datamodule())
    assert sorted(path.name for path in (tmp_path / "run").rglob("*") if path.is_file()) == [
        "last.ckpt",
        "previous.ckpt",
    ]
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert non_finite(saved["state_dict"]) == []


def test_finite_steps_in_between_begin_the_count_anew(tiny_world: TinyWorld, make_trainer: Callable) -> None:
    trainer = make_trainer(TrainOnly(NEW), Poison([1, 2, 4, 5, 7]), steps=9)
    trainer.fit(extended(tiny_world), tiny_world.datamodule())
    assert trainer.global_step == 9


def test_a_run_that_took_no_step_writes_nothing(tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path) -> None:
    writers = [SaveDelta(), StageReceipt(["delta.safetensors"])]
    trainer = make_trainer(TrainOnly(NEW), Poison([0, 1]), *writers, steps=2)
    with pytest.raises(UserError, match=r"got one whose 2 steps were all skipped.*Nothing was written"):
        trainer.fit(extended(tiny_world), tiny_world.datamodule())
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("whole", [0, 1])
def test_a_run_of_which_every_sample_is_bad_is_no_run(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path, whole: int
) -> None:
    (tmp_path / "set").mkdir()
    pictures = [image_entry(n).images[0][: None if n < whole else -30] for n in range(6)]
    write_shards([Entry(f"k{n}", image_entry(n).conversations, (pictures[n],)) for n in range(6)], tmp_path / "set")
    data = ImageTextShards(**grouped(train=str(tmp_path / "set"), batch_size=2, turns="single"))
    trainer = make_trainer(TrainOnly(["projector"]), SaveDelta(), StageReceipt(["delta.safetensors"]), steps=6)
    if whole:
        trainer.fit(tiny_world.unbuilt(), data)
    else:
        with pytest.raises(UserError, match=r"held nothing to learn: .*`bad_samples.jsonl`"):
            trainer.fit(tiny_world.unbuilt(), data)
    assert (
        (tmp_path / "run" / "delta.safetensors").exists() == (tmp_path / "run" / "stage.json").exists() == bool(whole)
    )


def test_a_learning_rate_out_of_bounds_ends_the_run(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    writers = [SaveDelta(), StageReceipt(["delta.safetensors"]), StageCheckpoint(1)]
    trainer = make_trainer(TrainOnly(["projector"]), *writers, steps=12, enable_checkpointing=True)
    with pytest.raises(UserError, match=r"not finite, from the output of \S+ on.*Lower `optim.lr`"):
        trainer.fit(extended(tiny_world, lr=1e30), tiny_world.datamodule("vqa"))
    assert not (tmp_path / "run" / "delta.safetensors").exists()
    for path in (tmp_path / "run").rglob("*.ckpt"):
        assert non_finite(torch.load(path, weights_only=True)["state_dict"]) == []


def test_a_probe_whose_loss_is_none_writes_no_plan(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    # The routers are fine, so that usage could be measured.
    parts = [TrainOnly(["routers"]), ExpertExtension(rule=ShiftRule()), Poison([0, 1], "language.model.lm_head")]
    with pytest.raises(UserError, match="2 steps were all skipped"):
        make_trainer(*parts, steps=2).fit(tiny_world.unbuilt(), tiny_world.datamodule())
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


def test_a_probe_whose_routers_give_no_numbers_at_its_end_writes_no_plan(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    class SpoilsAtTheEnd(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            gate = pl_module.get_submodule("language.model.model.layers.0.mlp")
            gate.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * torch.nan, *inputs[1:]))

    parts = [TrainOnly(["routers"]), SpoilsAtTheEnd(), ExpertExtension(rule=ShiftRule())]
    with pytest.raises(UserError, match="got NaN as their scores"):
        make_trainer(*parts, steps=2).fit(tiny_world.unbuilt(), tiny_world.datamodule())
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_base_whose_files_hold_no_numbers_is_refused_when_it_is_read(
    tiny_world: TinyWorld, tmp_path: Path, value: float
) -> None:
    shutil.copytree(tiny_world.base, tmp_path / "base")
    shutil.copytree(tiny_world.encoder, tmp_path / "encoder")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.self_attn.q_proj.weight"][3, 3] = value
    save_file(weights, file, {"format": "pt"})
    model = TinyWorld(tmp_path).unbuilt()
    with pytest.raises(
        UserError, match=r"weights that were read.* in 1 of \d+ tensors, .*layers\.1\.self_attn\.q_proj"
    ):
        model.configure_model()


def test_what_is_not_finite_is_in_no_checkpoint_and_no_delta(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = tiny_world.model(make_plan(), NEW)
    fine = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(fine)
    moments = {"optimizer_states": [{"state": {0: {"exp_avg_sq": torch.tensor([1.0, torch.inf])}}}]}
    with pytest.raises(UserError, match=r"in a checkpoint.*exp_avg_sq of the optimizer's parameter 0"):
        model.on_save_checkpoint({"state_dict": model.state_dict(), **moments})
    save_delta(model, tmp_path / "fine")
    with torch.no_grad():
        model.get_parameter(first_new_row(model)).view(-1)[0] = torch.nan
    with pytest.raises(UserError, match=r"in a checkpoint.*layers\.2"):
        model.on_save_checkpoint({"state_dict": model.state_dict()})
    with pytest.raises(UserError, match=r"in what was learned.*layers\.2"):
        save_delta(model, tmp_path / "spoilt")
    assert not (tmp_path / "spoilt").exists()
    fine["state_dict"][first_new_row(model)] = torch.full((2,), torch.nan)
    with pytest.raises(UserError, match=r"in the checkpoint.*Begin anew"):
        model.on_load_checkpoint(fine)


def test_every_kind_of_tensor_is_looked_at() -> None:
    tensors = {
        "half": torch.tensor([60000.0, -60000.0], dtype=torch.float16),  # whose difference is none
        "nan": torch.tensor([[1.0, torch.nan]]),
        "minus": torch.tensor([-torch.inf], dtype=torch.bfloat16),
        "scalar": torch.tensor(torch.inf),
        "numbers": torch.arange(3),
        "none": torch.empty(0),
        "shape": torch.empty(2, device="meta"),
    }
    assert non_finite(tensors) == ["nan", "minus", "scalar"]


def test_hooks_are_taken_off_when_steps_are_finite_again(tiny_world: TinyWorld, make_trainer: Callable) -> None:
    model = extended(tiny_world)
    make_trainer(TrainOnly(NEW), Poison([1]), steps=4).fit(model, tiny_world.datamodule())
    before = hooks(model)
    outputs = Outputs()
    outputs.watch(model)
    assert hooks(model) > before
    outputs.end()
    assert hooks(model) == before == hooks(tiny_world.model(make_plan(), NEW))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_the_number_in_a_row_is_above_zero() -> None:
    with pytest.raises(UserError, match="`in_a_row` of NumbersGuard of at least 1, got 0"):
        NumbersGuard(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_size_of_a_number_is_that_of_the_norm(dtype: torch.dtype) -> None:
    rows = [[-3.0, 2.0], [0.0, -0.0], [1.0, math.inf], [-math.inf, 1.0], [math.nan, 1.0], [math.inf, math.nan]]
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    expected = torch.stack([tensor.float().norm(math.inf) for tensor in tensors])
    assert torch.equal(largest(tensors).nan_to_num(-1, -2), expected.nan_to_num(-1, -2))
