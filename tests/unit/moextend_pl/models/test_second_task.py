"""A model that was extended for task A is extended for task B, and A stays as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import EXPERTS, GROWN, QUESTION, TinyWorld, make_plan, perturb
from PIL import Image
from torch import Tensor

from moextend_pl.cli.generate import main as ask
from moextend_pl.contracts import Batch, ExtensionPlan, TrainPlan, UserError
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.extension.extended_router import ExtendedRouter
from moextend_pl.runs.manifest import read_manifest

PARTS = ("new_experts", "new_routers", "calibration")
PLAN_A = make_plan(task="shape")
# One source is an expert that task A added.
PLAN_B = make_plan((1, 2), (EXPERTS - 1, 0), task="colour")


def extended(world: TinyWorld, start: Path | None, plan: ExtensionPlan | None) -> MoExtend:
    model = world.unbuilt(init_from=start)
    model.extension_plan, model.train_plan = plan, TrainPlan(PARTS)
    model.configure_model()
    return model.eval()


@pytest.fixture
def run_a(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    model = extended(tiny_world, None, PLAN_A)
    perturb([p for name in (*PARTS, "projector") for p in model.parts()[name]])
    save_delta(model, tmp_path / "a")
    return tmp_path / "a"


def batch_of(world: TinyWorld, model: MoExtend, task: str) -> Batch:
    batch = world.batch(model, "iti")
    batch["tasks"] = [task] * 3
    return batch


@torch.no_grad()
def logits(model: MoExtend, batch: Batch) -> Tensor:
    return model.language(batch, model.embed(batch))


def learn(model: MoExtend) -> None:
    perturb([p for name in PARTS for p in model.parts()[name]], seed=5)


def test_first_task_is_bit_identical_after_the_second(tiny_world: TinyWorld, run_a: Path) -> None:
    first, second = MoExtend.load(run_a), extended(tiny_world, run_a, PLAN_B)
    learn(second)
    for task in ("shape", ""):
        assert torch.equal(
            logits(second, batch_of(tiny_world, second, task)), logits(first, batch_of(tiny_world, first, task))
        )
    colour = batch_of(tiny_world, second, "colour")
    assert not torch.allclose(logits(second, colour), logits(first, colour), atol=1e-3)


def test_second_task_never_uses_experts_of_the_first(tiny_world: TinyWorld, run_a: Path) -> None:
    second = extended(tiny_world, run_a, PLAN_B)
    learn(second)
    for task, allowed in (("shape", {EXPERTS}), ("colour", {EXPERTS, EXPERTS + 1, EXPERTS + 2})):
        with second.language.watch.recording() as records:
            logits(second, batch_of(tiny_world, second, task))
        for record in records:
            new = set(record.indices.unique().tolist()) - set(range(EXPERTS))
            of_a = {EXPERTS} if record.layer in GROWN else set()
            assert new <= (of_a if task == "shape" else allowed - of_a)


def test_a_question_names_a_task_that_the_model_was_extended_for(tiny_world: TinyWorld, run_a: Path) -> None:
    second, image = extended(tiny_world, run_a, PLAN_B), Image.new("RGB", (8, 8))
    for task, picture in (("shape", image), ("colour", image), ("", None)):
        assert isinstance(second.generate(picture, QUESTION, task), str)
    for task, picture in (("color", image), ("color", None), ("", image)):
        with pytest.raises(UserError, match=rf"one of \['colour', 'shape'\], .* got '{task}'"):
            second.generate(picture, QUESTION, task)
    mixed = extended(tiny_world, run_a, replace(PLAN_B, task=""))
    assert isinstance(mixed.generate(image, QUESTION), str)


def test_the_command_line_names_the_task(
    tiny_world: TinyWorld, run_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    asked = ["--checkpoint", str(run_a), "--image", str(tmp_path / "picture.png"), "--prompt", QUESTION]
    with pytest.raises(UserError, match=r"one of \['shape'\]"):
        ask(asked)
    assert ask([*asked, "--task", "shape"]) == 0
    with Image.open(tmp_path / "picture.png") as picture:
        assert capsys.readouterr().out.strip() == MoExtend.load(run_a).generate(picture, QUESTION, "shape")


def test_balance_of_the_second_task_knows_nothing_of_the_experts_of_the_first(
    tiny_world: TinyWorld, run_a: Path
) -> None:
    second = extended(tiny_world, run_a, PLAN_B)
    learn(second)
    learning = second.parts()["new_routers"]
    batch = batch_of(tiny_world, second, "colour")

    def balance_and_gradients() -> list[Tensor]:
        balance = second(batch).balance
        return [balance.detach(), *torch.autograd.grad(balance, learning)]

    before = balance_and_gradients()
    routers = [module for module in second.modules() if isinstance(module, ExtendedRouter)]
    perturb([router.weight for router in routers if not router.weight.requires_grad], size=5.0)
    for got, expected in zip(balance_and_gradients(), before, strict=True):
        torch.testing.assert_close(got, expected)


def test_only_the_second_extension_learns_and_the_first_is_frozen(tiny_world: TinyWorld, run_a: Path) -> None:
    second = extended(tiny_world, run_a, PLAN_B)
    parts = second.parts()
    assert all(p.requires_grad for name in PARTS for p in parts[name])
    assert parts["earlier_extensions"]
    assert not any(p.requires_grad for p in parts["earlier_extensions"])


def test_new_experts_are_copies_of_trained_ones(tiny_world: TinyWorld, run_a: Path) -> None:
    plan = make_plan((2,), (EXPERTS,))
    second, first = extended(tiny_world, run_a, plan), MoExtend.load(run_a)
    trained, copies = first.parts()["new_experts"][-2:], second.parts()["new_experts"]
    assert all(torch.equal(a, b) for a, b in zip(trained, copies, strict=True))


def test_both_extensions_are_saved_and_loaded_again(tiny_world: TinyWorld, run_a: Path, tmp_path: Path) -> None:
    second = extended(tiny_world, run_a, PLAN_B)
    learn(second)
    save_delta(second, tmp_path / "b")
    assert read_manifest(tmp_path / "b").plans == (PLAN_A, PLAN_B)
    loaded = MoExtend.load(tmp_path / "b")
    for task in ("shape", "colour", ""):
        batch = batch_of(tiny_world, second, task)
        assert torch.equal(logits(loaded, batch), logits(second, batch))


def test_same_plan_again_goes_on_with_the_extension_it_made(tiny_world: TinyWorld, run_a: Path) -> None:
    again = extended(tiny_world, run_a, replace(PLAN_A, report={"rule": "another"}))
    assert again.plans == (PLAN_A,)
    batch = batch_of(tiny_world, again, "shape")
    assert torch.equal(logits(again, batch), logits(MoExtend.load(run_a), batch))


def test_open_routing_lets_the_second_extension_change_the_first_task(tiny_world: TinyWorld, run_a: Path) -> None:
    first, second = MoExtend.load(run_a), extended(tiny_world, run_a, PLAN_B)
    learn(second)
    second.language.open_to_text(True)
    batch = batch_of(tiny_world, second, "shape")
    assert not torch.allclose(logits(second, batch), logits(first, batch), atol=1e-3)


@torch.no_grad()
def test_masked_tokens_keep_new_experts_for_image_positions(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan((0, 1, 2), (0, 1, 2), routing="masked_tokens"))
    perturb([*model.parts()["new_experts"], *model.parts()["calibration"]])
    batch = tiny_world.batch(model, "iti")
    is_image = (batch["input_ids"] == model.language.image_token_id).reshape(-1)
    with model.language.watch.recording() as records:
        got = logits(model, batch)
    used = torch.stack([(record.indices >= EXPERTS).any(dim=-1) for record in records]).any(dim=0)
    assert used[is_image].any()
    assert not used[~is_image].any()
    text = tiny_world.batch(model, "tt")
    stock = tiny_world.stock()
    assert torch.equal(
        logits(model, text), stock(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits
    )
    assert got.isfinite().all()


@torch.no_grad()
def test_masked_tokens_survive_cached_decoding(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan((0, 1, 2), (0, 1, 2), routing="masked_tokens"))
    perturb([*model.parts()["new_experts"], *model.parts()["calibration"]])
    batch = tiny_world.batch(model, "it", generation=True)
    model.language.set_reach(batch)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    embeddings = model.embed(batch)
    with model.language.watch.recording() as records:
        model.language.model.generate(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], **options)
    steps = [record for record in records if len(record.indices) == 2]
    assert steps
    assert all((record.indices < EXPERTS).all() for record in steps)
    assert any((record.indices >= EXPERTS).any() for record in records)
