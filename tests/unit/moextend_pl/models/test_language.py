"""The language model: built from a folder or from scratch, watched, grown, and asked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_world import EXPERTS, TinyWorld, make_plan, perturb
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from moextend_pl.contracts import IGNORE_INDEX, UserError
from moextend_pl.models.base_model import ComputeSpec, set_attention
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.moe import dispatch
from moextend_pl.moe.extension.growth import NEW_PARTS, new_parameters
from moextend_pl.training.losses import balance_loss


def trained(tiny_world: TinyWorld, **options: object) -> MoELanguageModel:
    model = tiny_world.language(make_plan(init="copy", **options))
    perturb([p for parameters in new_parameters(model.model).values() for p in parameters])
    return model


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_masked_model_answers_text_as_the_stock_model_does(tiny_world: TinyWorld, implementation: str) -> None:
    model, stock = trained(tiny_world), tiny_world.stock(implementation)
    model.model.set_experts_implementation(implementation)
    batch = tiny_world.batch(model, "ttt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert torch.equal(model(batch), stock(**inputs).logits)
    model.open_to_text(True)
    assert not torch.allclose(model(batch), stock(**inputs).logits, atol=1e-2)
    model.open_to_text(False)
    assert torch.equal(model(batch), stock(**inputs).logits)


@torch.no_grad()
def test_masked_model_answers_text_in_half_precision_as_the_stock_model_does(tiny_world: TinyWorld) -> None:
    model, stock = trained(tiny_world).bfloat16(), tiny_world.stock().bfloat16()
    batch = tiny_world.batch(model, "ttt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert torch.equal(model(batch), stock(**inputs).logits)
    with torch.enable_grad():  # the pass of a training step, with frozen experts computed as `moextend` does
        dispatch.use(model.model, dispatch.FROZEN_EXPERTS)
        embeddings = model.embed(batch["input_ids"]).detach().requires_grad_()
        assert torch.equal(model(batch, embeddings), stock(**inputs).logits)


@pytest.mark.parametrize("implementation", ["grouped_mm", "moextend"])
@pytest.mark.parametrize("learning", [NEW_PARTS, ("new_experts",)], ids=["all that is new", "experts only"])
def test_checkpointed_activations_give_the_same_gradients_and_records(
    tiny_world: TinyWorld, implementation: str, learning: tuple[str, ...]
) -> None:
    results = []
    for checkpointed in (False, True):
        options = {"activation_checkpointing": checkpointed, "balance_weight": 0.5}
        # Embeddings are frozen: with reentrant checkpointing nothing would have a gradient here.
        model = tiny_world.model(make_plan(init="copy"), learning, experts_implementation=implementation, **options)
        model.train()
        perturb([p for parameters in new_parameters(model.language.model).values() for p in parameters], size=0.1)
        batch = tiny_world.batch(model, "iti")
        calls = []
        first = model.language.model.model.layers[0].mlp
        first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with model.language.watch.recording() as records:
            logits = model.language(batch, model.embed(batch))
        logits.float().logsumexp(-1).sum().backward()
        assert len(calls) == 1 + checkpointed
        assert [record.layer for record in records] == [0, 1, 2]
        model.zero_grad()
        output = model(batch)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((output.loss.detach(), gradients))
    (loss, expected), (other, got) = results
    assert torch.equal(loss, other)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        assert torch.equal(gradient, got[name]), name
    assert any(gradient.any() for gradient in expected.values())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_below_the_first_that_learns_are_no_part_of_the_backward_pass(
    tiny_world: TinyWorld, checkpointed: bool
) -> None:
    model = tiny_world.model(make_plan([1]), NEW_PARTS, activation_checkpointing=checkpointed).train()
    calls: list[int] = []
    outputs = {}
    for number, layer in enumerate(model.language.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
        layer.register_forward_hook(lambda _m, _i, out, number=number: outputs.__setitem__(number, out))
    model(tiny_world.batch(model, "ii")).loss.backward()
    assert sorted(calls) == ([0, 1, 1, 2, 2] if checkpointed else [0, 1, 2])
    assert [outputs[number].requires_grad for number in range(3)] == [False, True, True]


@torch.no_grad()
def test_open_plan_lets_text_reach_new_experts(tiny_world: TinyWorld) -> None:
    model, stock = trained(tiny_world, routing="open"), tiny_world.stock()
    batch = tiny_world.batch(model, "tt")
    expected = stock(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert not torch.allclose(model(batch), expected, atol=1e-2)


@torch.no_grad()
def test_reach_of_one_batch_does_not_leak_into_the_next(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(init="copy"))
    perturb([p for parameters in new_parameters(model.language.model).values() for p in parameters])
    text, image = tiny_world.batch(model, "tt"), tiny_world.batch(model, "ii")
    before = model.language(text, model.embed(text))
    model.language(image, model.embed(image))
    assert torch.equal(model.language(text, model.embed(text)), before)


def test_losses_equal_a_plain_computation_over_all_positions(tiny_world: TinyWorld) -> None:
    model = tiny_world.language(balance_weight=0.5)
    batch = tiny_world.batch(model, "ttt")
    output = model.losses(batch)
    logits = model(batch)
    expected, hits = [], []
    for row, labels in zip(logits, batch["labels"], strict=True):
        for place in range(1, len(labels)):
            if labels[place] >= 0:
                expected.append(F.cross_entropy(row[place - 1], labels[place]))
                hits.append(float(row[place - 1].argmax() == labels[place]))
    torch.testing.assert_close(output.token, torch.stack(expected).mean())
    assert output.accuracy.item() == pytest.approx(sum(hits) / len(hits))
    torch.testing.assert_close(output.loss, output.token + 0.5 * output.balance)
    assert output.balance > 0
    assert model.losses(batch, balanced=False).balance == 0


@torch.no_grad()
def test_logits_at_chosen_positions_equal_those_of_the_whole(tiny_world: TinyWorld) -> None:
    model = tiny_world.language()
    batch = tiny_world.batch(model, "ttt")
    chosen = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.3
    batch["labels"][:, 1:] = batch["input_ids"][:, 1:].masked_fill(~chosen[:, :-1], IGNORE_INDEX)
    chosen[:, -1] = False
    expected = model(batch)[chosen]
    known = model.with_host_facts(batch)["known"]
    torch.testing.assert_close(model(batch, known=known), expected)
    assert known.targets.tolist() == batch["input_ids"][:, 1:][chosen[:, :-1]].tolist()


@torch.no_grad()
def test_recording_sees_every_layer_once_in_order_and_only_inside(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(sources=(1, 2)))
    batch = tiny_world.batch(model, "it")
    model.language(batch, model.embed(batch))
    with model.language.watch.recording() as records:
        model.language(batch, model.embed(batch))
    model.language(batch, model.embed(batch))
    assert [(r.layer, r.num_experts) for r in records] == [(0, EXPERTS + 2), (1, EXPERTS), (2, EXPERTS + 2)]
    assert model.language.num_experts == {0: EXPERTS + 2, 1: EXPERTS, 2: EXPERTS + 2}
    assert all(len(r.indices) == batch["input_ids"].numel() for r in records)
    assert [r.logits.shape[1] for r in records] == [EXPERTS + 2, EXPERTS, EXPERTS + 2]


def test_balance_of_grown_layers_counts_image_sequences_only(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan())
    both, image = tiny_world.batch(model, "it"), tiny_world.batch(model, "i")
    with model.language.watch.recording() as records:
        model.language(both, model.embed(both))
    with model.language.watch.recording() as alone:
        model.language(image, model.embed(image))
    real = [both["attention_mask"].reshape(-1).bool(), image["attention_mask"].reshape(-1).bool()]
    expected = [balance_loss([r], [real[n]]) for r, n in ((alone[0], 1), (records[1], 0), (alone[2], 1))]
    torch.testing.assert_close(model(both).balance, torch.stack(expected).mean())


def test_balance_of_text_only_batch_leaves_grown_layers_out(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan())
    batch = tiny_world.batch(model, "tt")
    with model.language.watch.recording() as records:
        model.language(batch, model.embed(batch))
    expected = balance_loss([records[1]], [batch["attention_mask"].reshape(-1).bool()]) / 3
    torch.testing.assert_close(model(batch).balance, expected)


@pytest.mark.parametrize("kinds", ["it", "tt"])
def test_fillers_weigh_nothing_in_any_loss(tiny_world: TinyWorld, kinds: str) -> None:
    model = tiny_world.model(make_plan(routing="open"), balance_weight=0.1, z_weight=0.1)
    alone, filled = (tiny_world.batch(model, kinds) for _ in range(2))
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
        filled[name] = F.pad(filled[name], (0, 0, 0, 2), value=value)
    filled["attention_mask"][2:, 0] = 1
    expected, got = model(alone), model(filled)
    torch.testing.assert_close(got.balance, expected.balance)
    torch.testing.assert_close(got.router["z"], expected.router["z"])
    torch.testing.assert_close(got.loss, expected.loss)


def test_image_token_lies_outside_the_vocabulary_and_is_never_embedded(tiny_world: TinyWorld) -> None:
    model = tiny_world.language()
    words = len(model.tokenizer)
    assert model.image_token_id == words
    ids = torch.tensor([[1, words, 2]])
    table = model.model.get_input_embeddings().weight
    assert torch.equal(model.embed(ids)[0, [0, 2]], table[[1, 2]])
    assert len(table) == words


def test_model_from_scratch_takes_ids_from_its_tokenizer(tiny_world: TinyWorld, tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3,
    }  # fmt: skip
    model = MoELanguageModel(base=config, tokenizer=str(tiny_world.base))
    model.configure_model()
    assert model.model.config.vocab_size == len(model.tokenizer)
    assert model.model.config.eos_token_id == model.tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "base")
    loaded = MoELanguageModel(base=str(tmp_path / "base"))
    loaded.configure_model()
    batch = tiny_world.batch(model, "tt")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(batch), model.eval()(batch))


@torch.no_grad()
def test_answers_of_left_padded_prompts_equal_those_of_each_prompt_alone(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(init="copy"))
    together = model.answer(tiny_world.batch(model, "itti", generation=True))
    alone = [model.answer(tiny_world.batch(model, kind, generation=True, first=n))[0] for n, kind in enumerate("itti")]
    assert together == alone
    assert any(together)


def test_wrong_arguments_are_refused(tiny_world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no config\.json"):
        MoELanguageModel(base=str(tmp_path))
    with pytest.raises(UserError, match="Expected `tokenizer`"):
        MoELanguageModel(base={"model_type": "mixtral"})
    with pytest.raises(UserError, match="Expected a tokenizer folder"):
        _ = MoELanguageModel(base={"model_type": "mixtral"}, tokenizer=str(tmp_path / "none")).tokenizer


def test_a_misspelt_way_to_compute_experts_and_a_model_without_a_type_are_refused(tiny_world: TinyWorld) -> None:
    with pytest.raises(UserError, match="`experts_implementation` to be one of .*'moextend'.*, got 'groupedmm'"):
        tiny_world.language(experts_implementation="groupedmm")
    with pytest.raises(UserError, match=r"Expected `model_type` in `language.base`.*got \['hidden_size'\]"):
        MoELanguageModel(base={"hidden_size": 8}, tokenizer=str(tiny_world.base))
    model = MoELanguageModel(base={"model_type": "mixtrall"}, tokenizer=str(tiny_world.base))
    with pytest.raises(UserError, match="`language.base`: .*mixtrall"):
        model.model_config()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_sise": 16}, "'mixtral' does not know 'hidden_sise'; did you mean 'hidden_size'?"),
        ({"colour": 3}, "does not know 'colour'. Leave it out."),
        ({"model_type": "mixtrl"}, "no model type 'mixtrl'; did you mean 'mixtral'?"),
        ({"hidden_size": "big"}, "expected int, got str"),
        ({"num_experts_per_tok": 9}, "`num_experts_per_tok` of `language.base` in 1..3, got 9"),
        ({"num_experts_per_tok": 0}, "in 1..3, got 0"),
    ],
)
def test_configuration_that_transformers_would_take_without_a_word_is_refused(
    tiny_world: TinyWorld, change: dict[str, Any], words: str
) -> None:
    config = {"model_type": "mixtral", "num_local_experts": 3, "rope_theta": 1e4, **change}
    with pytest.raises(UserError) as caught:
        MoELanguageModel(base=config, tokenizer=str(tiny_world.base)).model_config()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_key_by_its_general_name_is_accepted(tiny_world: TinyWorld) -> None:
    config = {"model_type": "mixtral", "num_experts": 3, "rope_theta": 5e3, "num_experts_per_tok": 3}
    made = MoELanguageModel(base=config, tokenizer=str(tiny_world.base)).model_config()
    assert (made.num_local_experts, made.rope_parameters["rope_theta"]) == (3, 5e3)


def test_a_width_of_heads_that_published_configurations_name_is_used(tiny_world: TinyWorld) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    few = {"num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    base = {"model_type": "qwen3_moe", "intermediate_size": 16, **sizes, **few}
    model = MoELanguageModel(base=base, tokenizer=str(tiny_world.base))
    model.configure_model()
    assert model.model.get_submodule("model.layers.0.self_attn.q_proj").weight.shape == (4 * 16, 32)


def test_an_answer_leaves_no_mask_behind_for_other_passes(tiny_world: TinyWorld) -> None:
    world = tiny_world.model(make_plan(init="copy", routing="masked"))
    perturb([p for part in ("new_experts", "new_routers") for p in world.language.parts()[part]])
    batch = tiny_world.batch(world, "ii", generation=True)
    world.answer(batch)
    text = tiny_world.batch(world, "ttt")
    inputs = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
    with torch.no_grad():
        assert torch.equal(world.language.model(**inputs).logits, tiny_world.stock()(**inputs).logits)


def test_a_base_whose_files_lack_weights_is_refused(tiny_world: TinyWorld, tmp_path: Path) -> None:
    shutil.copytree(tiny_world.base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    model = MoELanguageModel(base=str(tmp_path / "base"))
    with pytest.raises(UserError, match=r"lack 1 weights of its MixtralForCausalLM, for example .*1.self_attn.q_proj"):
        model.configure_model()


def test_recordings_may_nest(tiny_world: TinyWorld) -> None:
    model = tiny_world.language()
    batch = tiny_world.batch(model, "tt")
    with model.watch.recording() as outer:
        model.losses(batch)
        model(batch)
    assert len(outer) == 2 * len(model.num_experts)
    assert not model.watch.listening


@torch.no_grad()
def test_attention_is_computed_as_asked_with_the_same_logits(tiny_world: TinyWorld) -> None:
    models = [tiny_world.language(attn_implementation=name) for name in (None, "eager")]
    assert [model.model.config._attn_implementation for model in models] == ["sdpa", "eager"]
    batch = tiny_world.batch(models[0], "ttt")
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(models[1](batch)[real], models[0](batch)[real])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", r"`attn_implementation` null or one of \['eager', .*'sdpa'\], got 'flash'"),
        ("flash_attention_2", "needs the package flash_attn, which is not installed"),
    ],
)
def test_attention_that_is_not_there_is_refused_before_anything_is_read(
    tiny_world: TinyWorld, name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        MoELanguageModel(base=str(tiny_world.base), compute=ComputeSpec(attn_implementation=name))


def test_attention_that_a_family_lacks_is_one_sentence(tiny_world: TinyWorld) -> None:
    model = tiny_world.language().model
    with pytest.raises(UserError, match="MixtralForCausalLM cannot compute attention as 'linear': .* Remove"):
        set_attention(model, "linear")


@pytest.mark.slow
def test_compiled_layers_learn_as_they_do_uncompiled_with_one_graph_for_layers_alike(tiny_world: TinyWorld) -> None:
    graphs = torch._dynamo.utils.counters
    plan, gradients = make_plan(layers=(0, 2), routing="masked"), []
    for compiled in (False, True):
        torch._dynamo.reset()
        graphs.clear()
        model = tiny_world.model(plan, ("new_experts", "new_routers", "calibration", "projector"), compile=compiled)
        with torch.no_grad():  # a fresh copy ties with its source, and rounding would decide between them
            for _, row in model.named_parameters():
                row.add_(0.1 * row.roll(1, dims=-1) if row.requires_grad else 0.0)
        output = model(tiny_world.batch(model, "iti"))
        output.loss.backward()
        learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        gradients.append({"loss": output.loss.detach(), "balance": output.balance.detach(), **learning})
    # Layers 0 and 2 are extended, layer 1 is not.
    assert graphs["stats"]["unique_graphs"] == 2
    assert len(gradients[0]) > 8
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, atol=1e-5, rtol=1e-4)
