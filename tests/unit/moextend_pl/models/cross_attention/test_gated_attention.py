"""NVLM-X: the base as it was at the start, texts as they were for ever, and each tag looking at its own tile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiles import SIZES, photo, tiled, write_tagged_base
from helpers.tiny_world import QUESTION, TOP_K, TinyWorld, make_plan, perturb
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralForCausalLM

from callbacks.usage_report import count_selections
from moextend_pl.contracts import Batch, Sample, TrainPlan, UserError
from moextend_pl.distillation.scopes import find_scopes
from moextend_pl.export.folder import exported
from moextend_pl.models.base_model import ComputeSpec
from moextend_pl.models.cross_attention.gated_attention import GatedAttention, looking_layers
from moextend_pl.models.cross_attention.sight import visible_tiles
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.usage import ExpertUsage
from moextend_pl.samples.collate import collate_generation, collate_packed, collate_training
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.host_facts import tiles_by_row
from moextend_pl.samples.pixels import PixelTransform
from moextend_pl.samples.turns import Turn


@pytest.fixture(scope="module")
def base(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tagged_base(tiny_world, tmp_path_factory.mktemp("tagged") / "base")


def built(world: TinyWorld, base: str, moved: bool = False, planned: bool = False, thumbnail: bool = False) -> MoExtend:
    model = tiled(world, base, looks=1, thumbnail=thumbnail)
    model.extension_plan = make_plan(init="preserving", routing="masked") if planned else None
    model.train_plan = TrainPlan(("projector",))
    model.configure_model()
    if moved:
        perturb(model.parts()["projector"], 0.3)
    return model.eval()


def sample(model: MoExtend, *pictures: int, prompt: bool = False) -> Sample:
    """A question about pictures of some shapes, or about none."""
    spec = model.sample_spec()
    encoder, transform = ConversationEncoder(spec), PixelTransform(spec)
    turns = (Turn("is it " + "<image>\n" * len(pictures) + QUESTION, "red"),)
    pixels = [transform(photo(SIZES[number], number)) for number in pictures]
    encode = encoder.encode_prompt if prompt else encoder.encode
    return encode("k", turns, pixels, [f"p{number}" for number in pictures])


@torch.no_grad()
def logits(model: MoExtend, batch: Batch) -> Tensor:
    return model.language(batch, model.embed(batch))


@torch.no_grad()
def stock_logits(base: str, batch: Batch) -> Tensor:
    stock = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    stock.set_experts_implementation("grouped_mm")
    return stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_gated_attention_is_a_plain_loop_over_tokens_and_what_they_may_look_at() -> None:
    torch.manual_seed(0)
    width, heads, head = 12, 3, 4
    gated = GatedAttention(width, heads)
    hidden, features = torch.randn(2, 5, width), torch.randn(2, 7, width)
    mask = torch.rand(2, 5, 7) < 0.4
    mask[0, 1] = False
    assert torch.equal(gated(hidden, features, mask), hidden)
    nn.init.constant_(gated.gate, 0.5)
    nn.init.constant_(gated.gate_inner, -0.7)
    expected = hidden.clone()
    for row, token in ((b, s) for b in range(2) for s in range(5) if mask[b, s].any()):
        seen = features[row][mask[row, token]]
        query = gated.query(gated.norm(hidden[row, token])).reshape(heads, head)
        keys, values = (m(seen).reshape(-1, heads, head) for m in (gated.key, gated.value))
        each = [((keys[:, h] @ query[h]) / head**0.5).softmax(0) @ values[:, h] for h in range(heads)]
        x = hidden[row, token] + torch.tanh(gated.gate) * gated.out(torch.cat(each))
        expected[row, token] = x + torch.tanh(gated.gate_inner) * gated.inner(gated.norm_inner(x))
    torch.testing.assert_close(gated(hidden, features, mask), expected)
    assert torch.equal(gated(hidden, features, mask)[0, 1], hidden[0, 1])
    assert len(looking_layers(80, 8)) == len(looking_layers(60, 6)) == 10


def test_a_tag_sees_its_own_tile_and_a_text_those_before_it_in_its_document(tiny_world: TinyWorld, base: str) -> None:
    model = tiled(tiny_world, base, looks=1)
    rows = [[sample(model, 1, 0), sample(model)], [sample(model), sample(model, 2), sample(model, 0)]]
    batch = collate_packed(rows, 0)
    numbers = tiles_by_row(batch["tiles"])
    assert numbers.tolist() == [[1, 2, 3, 4, 0], [5, 6, 7, 8, 9]]
    found = visible_tiles(batch, numbers)
    for row, ids in enumerate(batch["tiles"].tolist()):
        documents = batch["documents"][row].tolist()
        for token, own in enumerate(ids):
            before = [ids[n] for n in range(token + 1) if documents[n] == documents[token] and documents[token]]
            expected = {own} if own else set(before) - {0}
            assert {int(n) for n in numbers[row][found[row, token]]} == expected


def test_it_begins_as_exactly_the_base_and_texts_stay_so_while_gates_learn(tiny_world: TinyWorld, base: str) -> None:
    model = built(tiny_world, base)
    pictures = collate_training([sample(model, 1), sample(model), sample(model, 2, 0)], 0)
    texts = collate_training([sample(model), sample(model)], 0)
    assert torch.equal(logits(model, pictures), stock_logits(base, pictures))
    optimizer = torch.optim.SGD(model.parts()["projector"], lr=1.0)
    model(pictures).loss.backward()
    assert all(layer.gate.grad.abs() > 0 and layer.gate_inner.grad.abs() > 0 for layer in model.projector.gated)
    optimizer.step()
    model.eval()
    perturb(model.parts()["projector"], 0.3)
    assert torch.equal(logits(model, texts), stock_logits(base, texts))
    moved = logits(model, pictures)
    assert not torch.equal(moved, stock_logits(base, pictures))
    first = int((pictures["tiles"][0] > 0).int().argmax())
    # What stands before a picture, and a text beside it in the batch, never enter the cross-attention; the last bits of
    # experts' products may depend on the company of their tokens.
    expected = stock_logits(base, pictures)
    torch.testing.assert_close(moved[0, :first], expected[0, :first], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved[1], expected[1], rtol=1e-4, atol=1e-5)
    model = built(tiny_world, base, planned=True)  # and so with new experts, which pictures reach and texts do not
    perturb(model.parts()["projector"], 0.3)
    assert not torch.equal(logits(model, pictures)[0], stock_logits(base, pictures)[0])
    assert torch.equal(logits(model, texts), stock_logits(base, texts))
    with torch.no_grad():  # the base called by itself, behind a batch with pictures
        model.language.close_reach()
        assert torch.equal(model.language.model(texts["input_ids"]).logits, stock_logits(base, texts))


def test_tokens_of_pictures_are_told_from_texts_by_their_tags(tiny_world: TinyWorld, base: str) -> None:
    model = built(tiny_world, base)
    batch = model.with_host_facts(collate_training([sample(model, 1), sample(model)], 0))
    tags = batch["tiles"] > 0
    assert tags.any(dim=1).tolist() == [True, False]
    usage = ExpertUsage(model.language.num_experts)
    with torch.no_grad(), model.language.watch.recording() as records:
        logits(model, batch)
    count_selections(usage, "language", records, model, batch)
    counts = usage.compute()
    texts = batch["attention_mask"].bool() & ~tags
    assert int(counts["image"][0].sum()) == TOP_K * int(tags.sum())
    assert int(counts["text"][0].sum()) == TOP_K * int(texts.sum())
    scopes = find_scopes(batch, model.language.image_token_id, with_pictures=False)
    assert not any(bool(mask[0].any()) for mask in scopes.values())


def test_another_tile_changes_nothing_for_a_tag(tiny_world: TinyWorld, base: str) -> None:
    model = built(tiny_world, base, moved=True)
    batch = collate_training([sample(model, 2)], 0)
    features = model.projector(model.encode(batch["pixel_values"], batch["image_keys"])).detach()
    outputs = []
    for size in (0.0, 1.0):
        features[1] += size  # the second of three tiles
        hidden: list[Tensor] = []
        hook = model.projector.gated[0].register_forward_hook(lambda _m, _i, out, kept=hidden: kept.append(out))
        with torch.no_grad():
            embeddings = model.embed(batch)
            model.language.sight.show(features.clone(), batch["tiles"])
            model.language(batch, embeddings)
        hook.remove()
        outputs.append(hidden[0][0])
    own = batch["tiles"][0]
    changed = {int(n) for n in own[(outputs[0] != outputs[1]).any(dim=-1)]}
    assert changed == {0, 2}
    assert torch.equal(outputs[0][own == 1], outputs[1][own == 1])


@pytest.mark.parametrize("thumbnail", [False, True], ids=["X", "H"])
def test_answers_with_a_cache_are_those_of_whole_passes_alone_and_in_company(
    tiny_world: TinyWorld, base: str, thumbnail: bool
) -> None:
    model = built(tiny_world, base, moved=True, thumbnail=thumbnail)
    asked = [sample(model, 1, prompt=True), sample(model, prompt=True), sample(model, 2, 0, prompt=True)]
    together = model.answer(collate_generation(asked, 0))
    for one, answer in zip(asked, together, strict=True):
        batch = collate_generation([one], 0)
        assert model.answer(batch) == [answer]
        words: list[int] = []
        for _ in range(8):
            next_id = int(logits(model, batch)[0, -1].argmax())
            words.append(next_id)
            if next_id == model.language.tokenizer.eos_token_id:
                break
            for name, value in (("input_ids", next_id), ("attention_mask", 1), ("labels", -100), ("tiles", 0)):
                batch[name] = F.pad(batch[name], (0, 1), value=value)
        assert model.language.tokenizer.decode(words, skip_special_tokens=True).strip() == answer
    spec = model.generation.with_options({"beams": 2})
    beams = model.answer(collate_generation(asked, 0), spec)
    assert beams == [model.answer(collate_generation([one], 0), spec)[0] for one in asked]
    drawn = model.generation.with_options({"temperature": 1.0, "seed": 1})
    assert (
        model.answer(collate_generation(asked, 0), drawn)[2] == model.answer(collate_generation(asked[2:], 0), drawn)[0]
    )


def test_a_delta_holds_what_is_new_alone_and_is_loaded_again(tiny_world: TinyWorld, base: str, tmp_path: Path) -> None:
    model = built(tiny_world, base, moved=True)
    save_delta(model, tmp_path)
    names = set(load_file(tmp_path / "delta.safetensors"))
    assert names == {name for name, _ in model.named_parameters() if name.startswith("projector.")}
    assert {name for name in names if ".gated." in name}
    batch = collate_training([sample(model, 1), sample(model)], 0)
    again = MoExtend.load(tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    theirs = exported(again).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs, tiles=batch["tiles"]).logits, logits(model, batch))
    with pytest.raises(ValueError, match=r"Expected `tiles` of 3 images, as the processor makes it, got 0"):
        theirs(**inputs)
    with pytest.raises(UserError, match=r"Expected `reduce` as aim_merge .* `projector.cross_attention`"):
        again.generate(photo(SIZES[1]), QUESTION, reduce="aim")
    assert isinstance(again.generate(photo(SIZES[1]), QUESTION, reduce="aim_merge:1"), str)
    with pytest.raises(UserError, match=r"Expected the features of pictures before words are read"):
        again.language(batch)


def test_what_it_cannot_do_is_refused_in_one_sentence(tiny_world: TinyWorld, base: str) -> None:
    for tiles in ("6:untagged", ""):
        with pytest.raises(UserError, match=r"Expected `encoder.features.tiles` with tags"):
            tiled(tiny_world, base, tiles, looks=1)
    with pytest.raises(UserError, match=r"Expected `projector.cross_attention` in 1..3, the decoder layers, got 4"):
        tiled(tiny_world, base, looks=4).configure_model()
    with pytest.raises(UserError, match=r"that are not compiled for `projector.cross_attention`"):
        tiled(tiny_world, base, looks=1, compute=ComputeSpec(compile=True)).configure_model()
    with pytest.raises(UserError, match=r"Expected `projector.cross_attention` of at least 0, got -1"):
        tiled(tiny_world, base, looks=-1)
    with pytest.raises(UserError, match=r"Expected `projector.cross_attention` beside `thumbnail`"):
        tiled(tiny_world, base, thumbnail=True)
