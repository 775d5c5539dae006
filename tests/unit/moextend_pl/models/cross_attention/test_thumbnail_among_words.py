"""NVLM-H: the decoder reads thumbnails, and exactly so at the start; its tokens look at the tiles, texts at none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiles import SIZES, photo, tiled, write_tagged_base
from helpers.tiny_world import QUESTION, TinyWorld, make_plan, perturb
from torch import Tensor, nn
from transformers import MixtralForCausalLM

from moextend_pl.contracts import Batch, Sample, SampleSpec, TrainPlan
from moextend_pl.models.base_model import ComputeSpec
from moextend_pl.models.cross_attention.sight import visible_tiles
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend
from moextend_pl.samples.collate import collate_packed, collate_training
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.host_facts import looked_at
from moextend_pl.samples.pixels import PixelTransform
from moextend_pl.samples.turns import Turn

TILES = (0, 2, 3, 6, 6)
"""Of the pictures of `SIZES`, beside their thumbnails."""


@pytest.fixture(scope="module")
def base(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tagged_base(tiny_world, tmp_path_factory.mktemp("tagged") / "base")


def built(world: TinyWorld, base: str, planned: bool = False) -> MoExtend:
    model = tiled(world, base, looks=1, thumbnail=True)
    model.extension_plan = make_plan(init="preserving", routing="masked") if planned else None
    model.train_plan = TrainPlan(("projector",))
    model.configure_model()
    return model.eval()


def sample(spec: SampleSpec, *pictures: int) -> Sample:
    """A question about pictures of some shapes, or about none."""
    turns = (Turn("is it " + "<image>\n" * len(pictures) + QUESTION, "red"),)
    pixels = [PixelTransform(spec)(photo(SIZES[number], number)) for number in pictures]
    return ConversationEncoder(spec).encode("k", turns, pixels, [f"p{number}" for number in pictures])


@torch.no_grad()
def logits(model: MoExtend, batch: Batch) -> Tensor:
    return model.language(batch, model.embed(batch))


@torch.no_grad()
def with_thumbnails_alone(model: MoExtend, base: str, batch: Batch, pictures: Sequence[int]) -> Tensor:
    """Logits of transformers' own model, to which the thumbnails' features are given in their places, one by one."""
    stock = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    stock.set_experts_implementation("grouped_mm")
    whole = PixelTransform(replace(model.sample_spec(), tiles="", thumbnail=False))
    features = torch.zeros(0, model.language.width)
    for number in pictures:
        encoded = model.encode(whole(photo(SIZES[number], number))[None], [f"whole {number}"])
        features = torch.cat([features, model.projector(encoded)[0]])
    rows = []
    for ids in batch["input_ids"].tolist():
        row = []
        for token in ids:
            if token == model.language.image_token_id:
                row.append(features[0])
                features = features[1:]
            else:
                row.append(stock.get_input_embeddings().weight[token])
        rows.append(torch.stack(row))
    assert not len(features)
    return stock(inputs_embeds=torch.stack(rows), attention_mask=batch["attention_mask"]).logits


def test_it_begins_as_the_decoder_with_thumbnails_and_texts_stay_so_while_gates_learn(
    tiny_world: TinyWorld, base: str
) -> None:
    model = built(tiny_world, base)
    spec = model.sample_spec()
    pictures = collate_training([sample(spec, 1), sample(spec), sample(spec, 0), sample(spec, 2, 0, 3)], 0)
    shown = (1, 0, 2, 0, 3)
    assert len(pictures["image_keys"]) == sum(TILES[n] + 1 for n in shown)
    assert torch.equal(logits(model, pictures), with_thumbnails_alone(model, base, pictures, shown))
    optimizer = torch.optim.SGD(model.parts()["projector"], lr=1.0)
    model(pictures).loss.backward()
    assert all(layer.gate.grad.abs() > 0 and layer.gate_inner.grad.abs() > 0 for layer in model.projector.gated)
    optimizer.step()
    model.eval()
    perturb(list(model.projector.gated.parameters()), 0.3)
    moved, expected = logits(model, pictures), with_thumbnails_alone(model, base, pictures, shown)
    assert not torch.equal(moved[0], expected[0])
    # A text, and a picture that is its own thumbnail, never enter the cross-attention, nor what stands before tiles;
    # the last bits of experts' products may depend on the company of their tokens.
    first = int((pictures["tiles"][0] > 0).int().argmax())
    torch.testing.assert_close(moved[0, :first], expected[0, :first], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved[1:3], expected[1:3], rtol=1e-4, atol=1e-5)
    texts = collate_training([sample(spec), sample(spec)], 0)
    grown = built(tiny_world, base, planned=True)  # new experts, which pictures reach and texts do not
    perturb(list(grown.projector.gated.parameters()), 0.3)
    for each in (model, grown):
        assert torch.equal(logits(each, texts), with_thumbnails_alone(each, base, texts, ()))
    alone = collate_training([sample(spec, 0)], 0)
    loss = model(alone).loss
    loss.backward()  # layers that nothing is shown to take part with a zero
    assert all(parameter.grad is not None for parameter in model.projector.gated.parameters())


def test_a_thumbnail_sees_its_own_tiles_and_a_text_all_tiles_before_it_in_its_document(
    tiny_world: TinyWorld, base: str
) -> None:
    model = built(tiny_world, base)
    perturb(model.parts()["projector"], 0.3)
    spec = model.sample_spec()
    shapes = [[(1, 0), ()], [(), (2, 1), (0,)]]
    batch = collate_packed([[sample(spec, *each) for each in row] for row in shapes], 0)
    together = logits(model, batch)[batch["documents"] > 0]
    alone = [logits(model, collate_training([sample(spec, *each)], 0))[0] for row in shapes for each in row]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    looked = looked_at(batch, spec.image_token_id)
    assert looked.images.tolist() == [[1, 2, 0, 0, 0], [5, 6, 7, 9, 10]]
    assert looked.places.tolist() == [[0, 1, 0, 0, 0], [0, 1, 2, 0, 1]]
    assert set(batch["tiles"].flatten().tolist()) == {0, 3, 4, 8, 11, 12}  # thumbnails
    found = visible_tiles(batch, looked.shown)
    of_thumbnail = {3: {1, 2}, 4: set(), 8: {5, 6, 7}, 11: {9, 10}, 12: set()}
    for row, ids in enumerate(batch["tiles"].tolist()):
        documents = batch["documents"][row].tolist()
        for token, own in enumerate(ids):
            before = {ids[n] for n in range(token + 1) if documents[n] == documents[token] and documents[token]}
            expected = set().union(*(of_thumbnail[n] for n in ({own} if own else before - {0})))
            assert {int(n) for n in looked.images[row][found[row, token]]} == expected


def test_what_is_looked_at_is_a_plain_loop_over_tags_and_features(tiny_world: TinyWorld, base: str) -> None:
    model = built(tiny_world, base)
    spec, tokenizer, gated = model.sample_spec(), model.language.tokenizer, model.projector.gated[0]
    perturb(list(gated.parameters()), 0.3)
    names = [tokenizer(f"<tile_{n}>", add_special_tokens=False)["input_ids"] for n in range(1, 7)]
    assert model.projector.tags.tolist() == names
    names[1] += [3]  # a longer one
    model.projector.tags = torch.tensor([row + [-1] * (2 - len(row)) for row in names])
    batch = collate_training([sample(spec, 1, 2), sample(spec), sample(spec, 0, 1)], 0)
    calls: list[tuple[Tensor, Tensor]] = []
    hook = gated.register_forward_hook(lambda _m, inputs, out: calls.append((inputs[0], out)))
    with torch.no_grad():
        logits(model, batch)
        hook.remove()
        features = model.projector(model.encode(batch["pixel_values"], batch["image_keys"]))
        hidden, found = calls[0]
        embedded = model.language.model.get_input_embeddings().weight
        squares = iter(features)
        for row, shapes in enumerate([(1, 2), (), (0, 1)]):
            after: list[Tensor] = []
            pictures = []
            for number in shapes:
                tiles = [torch.cat([embedded[names[n]], next(squares)]) for n in range(TILES[number])]
                next(squares)  # the thumbnail
                pictures.append(tiles)
            starts = torch.unique(batch["tiles"][row][batch["tiles"][row] > 0]).tolist()
            for token, own in enumerate(batch["tiles"][row].tolist()):
                if own:
                    seen = pictures[starts.index(own)]
                    after = [x for tiles in pictures[: starts.index(own) + 1] for x in tiles]
                else:
                    seen = after
                x = hidden[row, token]
                expected = looked(gated, x, torch.cat(seen)) if seen else x
                torch.testing.assert_close(found[row, token], expected, rtol=1e-4, atol=1e-5)


def looked(gated: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
    """One token that looks at some features, head by head."""
    heads = gated.heads
    query = gated.query(gated.norm(x)).reshape(heads, -1)
    keys, values = (m(seen).reshape(len(seen), heads, -1) for m in (gated.key, gated.value))
    each = [((keys[:, h] @ query[h]) / query.shape[1] ** 0.5).softmax(0) @ values[:, h] for h in range(heads)]
    x = x + torch.tanh(gated.gate) * gated.out(torch.cat(each))
    return x + torch.tanh(gated.gate_inner) * gated.inner(gated.norm_inner(x))


@pytest.mark.parametrize("quantize", [None, pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_run_on_whole_pictures_goes_on_with_tiles_to_look_at(
    tiny_world: TinyWorld, base: str, tmp_path: Path, quantize: str | None
) -> None:
    if quantize:
        pytest.importorskip("bitsandbytes")
    before = tiled(tiny_world, base, 1, compute=ComputeSpec(quantize=quantize))
    before.train_plan = TrainPlan(("projector",))
    before.configure_model()
    perturb(before.parts()["projector"], 0.3)
    save_delta(before.eval(), tmp_path / "first")
    then = tiled(tiny_world, base, looks=1, thumbnail=True, compute=ComputeSpec(quantize=quantize))
    then.init_from = tmp_path / "first"
    then.train_plan = TrainPlan(("projector",))
    then.configure_model()
    then.eval()
    batches = [collate_training([sample(m.sample_spec(), 1), sample(m.sample_spec(), 3, 0)], 0) for m in (before, then)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert torch.equal(logits(before, batches[0]), logits(then, batches[1]))
    then(batches[1]).loss.backward()
    assert all(layer.gate.grad.abs() > 0 for layer in then.projector.gated)
    perturb(list(then.projector.gated.parameters()), 0.3)
    texts = collate_training([sample(then.sample_spec())], 0)
    assert torch.equal(logits(before, texts), logits(then, texts))
    save_delta(then, tmp_path / "second")
    again = MoExtend.load(tmp_path / "second")
    assert torch.equal(logits(again, batches[1]), logits(then, batches[1]))
    assert again.generate(photo(SIZES[3]), QUESTION) == then.generate(photo(SIZES[3]), QUESTION)
    assert isinstance(again.generate(photo(SIZES[3]), QUESTION, reduce="aim_merge:1"), str)
