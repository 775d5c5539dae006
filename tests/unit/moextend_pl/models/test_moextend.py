"""The whole model: pictures between words, text-only batches, questions from Python."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_world import QUESTION, TinyWorld, make_plan, perturb, picture
from PIL import Image
from torch import Tensor

from callbacks.expert_extension import ExpertExtension
from callbacks.train_only import TrainOnly
from moextend_pl.contracts import Batch
from moextend_pl.samples.prompt import prompt_batch
from moextend_pl.training.answers import exact_match
from moextend_pl.training.language_losses import LanguageOutput
from moextend_pl.training.losses import learned_tokens

PARTS = ("projector", "new_experts", "new_routers", "calibration")


@torch.no_grad()
def test_projected_features_stand_on_the_placeholders_of_their_image(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan())
    batch = tiny_world.batch(model, "iti")
    embedded = model.embed(batch)
    features = model.projector(model.encoder(batch["pixel_values"]))
    is_image = batch["input_ids"] == model.language.image_token_id
    assert is_image.sum(dim=1).tolist() == [4, 0, 4]
    torch.testing.assert_close(embedded[0][is_image[0]], features[0])
    torch.testing.assert_close(embedded[2][is_image[2]], features[1])
    table = model.language.model.get_input_embeddings().weight
    assert torch.equal(embedded[~is_image], table[batch["input_ids"][~is_image]])


@pytest.mark.parametrize("end", ["fit", "validate"])
def test_after_a_run_the_language_model_by_itself_is_the_base(
    end: str, tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    make_plan(init="copy").save(tmp_path / "plan.yaml")
    model, data = tiny_world.unbuilt(), tiny_world.datamodule("vqa", batch_size=2)
    trainer = make_trainer(TrainOnly(list(PARTS)), ExpertExtension(plan=str(tmp_path / "plan.yaml")), steps=1)
    trainer.fit(model, data)
    if end == "validate":
        trainer.validate(model, data)
    ids = tiny_world.batch(model, "tt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model.eval().language.model(ids).logits, tiny_world.stock()(ids).logits)


def gradients_of_one_step(
    world: TinyWorld, make_trainer: Callable, batch_size: int, **options: Any
) -> tuple[list[Tensor], list[int]]:
    """Returns the projector's gradients in one step over four samples, and the learned tokens of each batch."""
    model = world.model(parts=["projector"], balance_weight=0.0)
    learning = model.parts()["projector"]
    start, sizes, forward = [parameter.detach().clone() for parameter in learning], [], model.forward

    def count(batch: Batch) -> LanguageOutput:
        sizes.append(learned_tokens(batch["labels"]))
        return forward(batch)

    model.forward = count  # type: ignore[method-assign]
    model.configure_optimizers = lambda: torch.optim.SGD(learning, lr=1.0)  # type: ignore[method-assign]
    data = world.datamodule("mixed", batch_size=batch_size, turns="together")
    make_trainer(steps=1, accumulate_grad_batches=4 // batch_size, limit_val_batches=0, **options).fit(model, data)
    return [before - after.detach() for before, after in zip(start, learning, strict=True)], sizes


def test_a_step_accumulated_over_batches_is_the_step_of_all_their_tokens(
    tiny_world: TinyWorld, make_trainer: Callable
) -> None:
    whole, tokens = gradients_of_one_step(tiny_world, make_trainer, 4)
    parts, sizes = gradients_of_one_step(tiny_world, make_trainer, 1)
    assert sum(sizes) == sum(tokens)
    assert len(set(sizes)) > 1
    for got, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_accumulated_gradients_are_clipped_as_they_are_applied(tiny_world: TinyWorld, make_trainer: Callable) -> None:
    clipped, _ = gradients_of_one_step(tiny_world, make_trainer, 1, gradient_clip_val=1e-3)
    norm = torch.cat([gradient.flatten() for gradient in clipped]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_text_only_batch_gives_every_learning_parameter_a_zero_gradient(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(), PARTS)
    model(tiny_world.batch(model, "tt")).loss.backward()
    for name in PARTS:
        for parameter in model.parts()[name]:
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_preserving_extension_is_the_base_at_step_zero_and_learns(tiny_world: TinyWorld) -> None:
    base = tiny_world.model(parts=["projector"])
    grown = tiny_world.model(make_plan(init="preserving"), PARTS)
    batch = tiny_world.batch(base, "itii")
    torch.testing.assert_close(
        grown.language(batch, grown.embed(batch)), base.language(batch, base.embed(batch)), atol=1e-5, rtol=1e-5
    )
    grown(batch).token.backward()
    for part in ("new_experts", "new_routers"):
        assert all(p.grad.abs().max() > 0 for p in grown.parts()[part])
    # The calibration starts with W2 = 0, so that W2 learns first.
    in_proj, out_proj = grown.parts()["calibration"][:2]
    assert out_proj.grad.any()
    assert not in_proj.grad.any()


@torch.no_grad()
def test_training_every_new_weight_leaves_text_logits_bit_identical(tiny_world: TinyWorld) -> None:
    stock, model = tiny_world.stock(), tiny_world.model(make_plan(init="copy"), PARTS)
    batch = tiny_world.batch(model, "tttt")
    expected = stock(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(model.language(batch, model.embed(batch)), expected)
    perturb([p for name in PARTS for p in model.parts()[name]], size=3.0)
    assert torch.equal(model.language(batch, model.embed(batch)), expected)


def test_generate_equals_the_answer_to_the_same_prompt_of_the_data(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(init="copy"))
    batch = tiny_world.batch(model, "i", generation=True)
    image = Image.open(io.BytesIO(picture(0)))
    prompt = prompt_batch(model.sample_spec(), image, QUESTION, torch.device("cpu"))
    assert torch.equal(prompt["input_ids"], batch["input_ids"])
    torch.testing.assert_close(prompt["pixel_values"], batch["pixel_values"], atol=1e-6, rtol=1e-6)
    assert model.generate(image, QUESTION) == model.answer(batch)[0]


def test_generate_without_a_picture_asks_about_text_alone(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(init="copy"))
    prompt = prompt_batch(model.sample_spec(), None, "picture is red . what is the color ?", torch.device("cpu"))
    assert prompt["image_keys"] == []
    assert not (prompt["input_ids"] == model.language.image_token_id).any()
    stock = tiny_world.stock()
    tokens = stock.generate(
        prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=8, do_sample=False,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    text = model.language.tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.generate(None, "picture is red . what is the color ?") == text.strip()


def test_second_picture_is_not_answered_by_the_first_ones_features(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(parts=["projector"])
    spec = model.sample_spec()
    device = torch.device("cpu")
    for number in (0, 1):
        image = Image.open(io.BytesIO(picture(number)))
        batch = prompt_batch(spec, image, QUESTION, device)
        model.generate(image, QUESTION)
        got = model.encode(batch["pixel_values"], batch["image_keys"])
        with torch.no_grad():
            torch.testing.assert_close(got, model.encoder(batch["pixel_values"]))


@torch.no_grad()
def test_training_mode_leaves_a_frozen_tower_its_statistics_and_its_features(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(parts=["projector"])
    batch = tiny_world.batch(model, "ii")
    expected = model.encoder(batch["pixel_values"])
    statistics = {name: buffer.clone() for name, buffer in model.encoder.named_buffers()}
    assert statistics  # else nothing could have changed
    model.train()
    assert model.projector.training
    assert torch.equal(model.encoder(batch["pixel_values"]), expected)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.encoder.named_buffers())


def test_sample_spec_is_known_before_anything_is_built(tiny_world: TinyWorld) -> None:
    model = tiny_world.unbuilt()
    spec = model.sample_spec()
    assert not model._built
    assert (spec.tokens_per_image, spec.image_size, spec.image_token_id) == (4, 32, len(spec.tokenizer))


@pytest.mark.parametrize(
    ("prediction", "truth", "equal"),
    [
        (" Blue", "blue", True),
        ("blue\n", "Blue ", True),
        ("blue .", "blue", False),
        ("", "blue", False),
        ("", "", True),
    ],
)
def test_exact_match_ignores_case_and_outer_white_space(prediction: str, truth: str, equal: bool) -> None:
    assert exact_match(prediction, truth) is equal


def test_features_kept_of_another_type_are_not_given_out(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(parts=["projector"])
    batch = tiny_world.batch(model, "i")
    assert model.encode(batch["pixel_values"], batch["image_keys"]).dtype == torch.float32
    model.to(torch.float64)
    assert model.encode(batch["pixel_values"].double(), batch["image_keys"]).dtype == torch.float64
