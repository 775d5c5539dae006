"""Questions answered from fewer picture tokens: what may be asked for, and what then reaches the language model."""

from __future__ import annotations

import pytest
import torch
from helpers.asked import endless, shown
from helpers.tiny_world import QUESTION, WIDTH, TinyWorld, tiny_mixtral
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moextend_pl.contracts import UserError
from moextend_pl.inference.reduction import Reduction
from moextend_pl.inference.spec import GenerationSpec
from moextend_pl.inference.token_merging import merge_tokens
from moextend_pl.inference.token_pruning import dropping
from moextend_pl.models.moextend import MoExtend


@pytest.mark.parametrize(
    ("text", "reduction"),
    [
        (None, Reduction()),
        ("aim", Reduction(2, True)),
        ("aim:13,21", Reduction(2, True, (13, 21))),
        ("aim:13,21,0", Reduction(0, True, (13, 21))),
        ("aim_merge", Reduction(2)),
        ("aim_merge:3", Reduction(3)),
    ],
)
def test_schedules_have_a_name_or_numbers(text: str | None, reduction: Reduction) -> None:
    assert Reduction.parse(text) == reduction


@pytest.mark.parametrize("text", ["", "fastv", "aim:1", "aim:1,2,3,4", "aim_merge:0", "aim:a,b", "aim:"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="Expected `reduce` to be aim"):
        GenerationSpec(reduce=text)


def test_published_span_is_half_of_the_layers_and_two_sevenths_behind() -> None:
    assert Reduction.parse("aim").layers(28) == (14, 22)
    assert Reduction.parse("aim").layers(2) == (1, 2)


def lengths(model: MoExtend) -> list[list[int]]:
    """Returns, for each pass from now on, how many tokens each layer computes."""
    found: list[list[int]] = []
    layers = model.language.model.model.layers

    def heard(layer: object, args: tuple[Tensor, ...]) -> None:
        if layer is layers[0]:
            found.append([])
        found[-1].append(args[0].shape[1])

    for layer in layers:
        layer.register_forward_pre_hook(heard)
    return found


def test_layers_compute_merged_tokens_and_fewer_of_them_each(tiny_world: TinyWorld) -> None:
    model = endless(tiny_world)
    spec, found = model.sample_spec(), lengths(model)
    whole = model.generate(shown(1), QUESTION)
    text = found[0][0] - spec.tokens_per_image
    assert spec.tokens_per_image == 4
    reduced = model.generate(shown(1), QUESTION, reduce="aim:0,2,0")
    merged = model.generate(shown(1), QUESTION, reduce="aim:1,3,1")
    prompts = [passes for passes in found if passes[0] > 1]
    assert prompts == [[text + n for n in counts] for counts in ([4, 4, 4], [4, 2, 0], [2, 2, 1])]
    assert len({whole, reduced, merged}) > 1
    assert model.generate(shown(1), QUESTION) == whole


def test_answers_in_a_batch_are_those_alone(tiny_world: TinyWorld) -> None:
    model = endless(tiny_world)
    pictures, questions = [shown(1), None, shown(2), [shown(3), shown(4)]], [QUESTION, QUESTION, "is it red ?", "red ?"]
    together = model.generate(pictures, questions, reduce="aim:1,3,1")
    assert together == [model.generate(p, q, reduce="aim:1,3,1") for p, q in zip(pictures, questions, strict=True)]


def test_texts_alone_are_answered_as_ever(tiny_world: TinyWorld) -> None:
    model = endless(tiny_world)
    assert model.generate(None, QUESTION, reduce="aim") == model.generate(None, QUESTION)


def test_a_stage_cannot_be_trained_on_reduced_answers(tiny_world: TinyWorld) -> None:
    with pytest.raises(UserError, match="in a stage, got 'aim'"):
        tiny_world.unbuilt(reduce="aim")


def test_a_long_prompt_costs_a_quarter_at_most() -> None:
    """AIM's criterion: 2,000 picture tokens and 100 of text, a quarter kept, dropped from half of the layers on."""
    # Experts and attention as products that the counter knows.
    model = tiny_mixtral(num_hidden_layers=7, max_position_embeddings=4096, experts_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    text, picture = (torch.randn(1, count, WIDTH, generator=generator) for count in (100, 2000))
    operations = []
    for rounds, reduce in ((0, None), (2, "aim")):
        merged = merge_tokens(picture, rounds)
        embeddings = torch.cat([text[:, :50], merged, text[:, 50:]], dim=1)
        is_image = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
        is_image[:, 50 : 50 + merged.shape[1]] = True
        asked = dropping(model, reduce, is_image, torch.ones_like(is_image))
        with torch.no_grad(), asked, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(inputs_embeds=embeddings, logits_to_keep=1)
        operations.append(counter.get_total_flops())
    assert operations[1] / operations[0] < 0.25
