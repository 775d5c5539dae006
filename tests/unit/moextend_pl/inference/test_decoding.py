"""Answers: equal to a plain loop without a cache, alone and in a batch; where they end; how tokens are drawn."""

from __future__ import annotations

import pytest
import torch
from helpers.asked import endless, extended, passes, shown
from helpers.tiny_world import QUESTION, TinyWorld
from transformers import GenerationConfig, MambaConfig

from moextend_pl.contracts import Batch, UserError
from moextend_pl.inference.decoding import SeededDraw, context_of
from moextend_pl.inference.spec import GenerationSpec
from moextend_pl.models.moextend import MoExtend
from moextend_pl.samples.prompt import prompt_batch

CONTEXT = 128  # of the tiny world


@torch.no_grad()
def without_a_cache(model: MoExtend, batch: Batch, steps: int) -> list[list[int]]:
    """Chooses the most probable token of the whole model's logits, again and again."""
    found: list[list[int]] = [[] for _ in batch["keys"]]
    embeddings, mask, ids = model.embed(batch), batch["attention_mask"], batch["input_ids"]
    for _ in range(steps):
        logits = model.language({**batch, "input_ids": ids, "attention_mask": mask}, embeddings)
        best = logits[:, -1].argmax(dim=-1)
        for row, token in zip(found, best.tolist(), strict=True):
            row.append(token)
        ids, mask = torch.cat([ids, best[:, None]], dim=1), torch.cat([mask, torch.ones_like(best)[:, None]], dim=1)
        embeddings = torch.cat([embeddings, model.language.embed(best[:, None])], dim=1)
    return found


def text_of(model: MoExtend, tokens: list[int]) -> str:
    return model.language.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def first_words(model: MoExtend) -> tuple[list[int], int, str]:
    """Returns the tokens of an answer, and the place and text of one that was not there before."""
    (tokens,) = without_a_cache(model, prompt_batch(model.sample_spec(), None, QUESTION, model.device), 8)
    place = next(n for n in range(1, 8) if tokens[n] not in tokens[:n] and text_of(model, tokens[n : n + 1]))
    return tokens, place, text_of(model, tokens[place : place + 1])


@pytest.mark.parametrize("routing", ["masked", "masked_tokens", "open"])
def test_answers_equal_those_of_a_plain_loop_without_a_cache(tiny_world: TinyWorld, routing: str) -> None:
    model = extended(tiny_world, routing)
    spec = GenerationSpec(max_new_tokens=6)
    for n, kind in enumerate("iti"):  # without a mask over padding, which the plain loop does not number by
        batch = tiny_world.batch(model, kind, generation=True, first=n)
        (tokens,) = without_a_cache(model, batch, 6)
        ends = tokens.index(2) if 2 in tokens else len(tokens)
        assert model.answer(batch, spec) == [model.language.tokenizer.decode(tokens[:ends], skip_special_tokens=True)]


def test_answers_in_a_batch_equal_those_alone_greedy_drawn_and_by_beams(tiny_world: TinyWorld) -> None:
    model = extended(tiny_world)
    questions = [QUESTION, "picture is red . what is the color ?", "a small picture is blue . what ?", QUESTION]
    pictures = [shown(0), None, None, shown(3)]
    for options in ({}, {"temperature": 1.5, "top_p": 0.95, "top_k": 20, "seed": 7}, {"beams": 3}):
        together = model.generate(pictures, questions, batch_size=3, max_new_tokens=5, **options)
        alone = [model.generate(p, q, max_new_tokens=5, **options) for p, q in zip(pictures, questions, strict=True)]
        assert together == alone
        assert len(set(together)) > 1


def test_beams_are_those_of_transformers(tiny_world: TinyWorld) -> None:
    model, stock = extended(tiny_world), tiny_world.stock()
    batch = tiny_world.batch(model, "tt", generation=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    tokens = stock.generate(**inputs, num_beams=4, max_new_tokens=8, eos_token_id=2, pad_token_id=0)
    texts = model.language.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.answer(batch, GenerationSpec(beams=4)) == [text.strip() for text in texts]


def test_a_seed_gives_the_same_answer_again_and_another_gives_another(tiny_world: TinyWorld) -> None:
    model = extended(tiny_world)

    def drawn(seed: int | None) -> object:
        return model.generate(None, [QUESTION, "a small picture ?"], temperature=2.0, seed=seed)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    torch.manual_seed(5)
    first = drawn(None)
    assert drawn(None) != first
    torch.manual_seed(5)
    assert drawn(None) == first


def test_a_question_asked_many_times_is_drawn_many_times_unless_a_seed_is_given(tiny_world: TinyWorld) -> None:
    model = extended(tiny_world)
    torch.manual_seed(5)
    assert len(set(model.generate(None, [QUESTION] * 8, temperature=2.0, max_new_tokens=8))) > 4
    assert len(set(model.generate(None, [QUESTION] * 8, temperature=2.0, max_new_tokens=8, seed=1))) == 1


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    logits, draws = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf]), 4000
    chosen = SeededDraw(range(draws))(torch.zeros(draws, 0), logits.expand(draws, 5)).argmax(dim=-1)
    shares = torch.bincount(chosen, minlength=5) / draws
    torch.testing.assert_close(shares, logits.softmax(dim=0), atol=0.03, rtol=0)
    assert shares[4] == 0


@pytest.mark.parametrize("whose", ["one of the base's", "the base's only", "the tokenizer's"])
def test_every_end_token_ends_an_answer(tiny_world: TinyWorld, whose: str) -> None:
    model = endless(tiny_world)
    tokens, place, word = first_words(model)
    config: GenerationConfig = model.language.model.generation_config
    if whose == "the tokenizer's":
        model.language.tokenizer.eos_token = word
        config.eos_token_id = 99
    else:
        config.eos_token_id = [99, tokens[place]] if whose == "one of the base's" else tokens[place]
    count = passes(model)
    assert model.generate(None, QUESTION) in (text_of(model, tokens[:place]), text_of(model, tokens[: place + 1]))
    assert count["all"] == place + 1


def test_the_longest_answer_is_the_users_else_the_bases(tiny_world: TinyWorld) -> None:
    model = endless(tiny_world)
    count = passes(model)
    for own, given, expected in ((5, None, 5), (5, 3, 3), (None, 7, 7)):
        count.clear()
        model.language.model.generation_config.max_new_tokens = own
        model.generate(None, QUESTION, **({} if given is None else {"max_new_tokens": given}))
        assert count["all"] == expected


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_computed(tiny_world: TinyWorld) -> None:
    model = extended(tiny_world)
    assert context_of(model.language.model_config()) == CONTEXT

    def refuse(*_: object) -> None:
        raise AssertionError("something was computed")

    model.language.model.register_forward_pre_hook(refuse)
    model.encoder.register_forward_pre_hook(refuse)
    with pytest.raises(UserError, match=f"model's context, {CONTEXT}, got .* pictures included"):
        model.generate(shown(0), "small " * CONTEXT)
    with pytest.raises(UserError, match=r"^The question .*context"):
        model.generate("nowhere.png", [QUESTION, "small " * CONTEXT])
    batch = tiny_world.batch(model, "it", generation=True)
    batch["attention_mask"] = batch["attention_mask"].repeat(1, CONTEXT)
    with pytest.raises(UserError, match="^i000: expected a prompt"):
        model.answer(batch)


def test_a_short_prompt_is_not_cut_by_the_room_that_a_long_one_leaves(tiny_world: TinyWorld) -> None:
    model = endless(tiny_world)
    length = len(model.language.tokenizer(QUESTION)["input_ids"])
    questions = ["small " * (CONTEXT - 3 - length - 4) + QUESTION, QUESTION]
    together = model.generate(None, questions, max_new_tokens=12)
    assert together == [model.generate(None, question, max_new_tokens=12) for question in questions]
    long, short = ([*map(str, text.split())] for text in together)
    assert len(short) > len(long)


def test_settings_of_the_base_for_drawing_do_not_make_answers_random(tiny_world: TinyWorld) -> None:
    model = extended(tiny_world)
    expected = model.generate(None, QUESTION)
    for name, value in {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 3}.items():
        setattr(model.language.model.generation_config, name, value)
    assert [model.generate(None, QUESTION) for _ in range(3)] == [expected] * 3


def test_an_answer_ends_before_a_stop_word_and_computes_nothing_behind_it(tiny_world: TinyWorld) -> None:
    model = endless(tiny_world)
    tokens, place, word = first_words(model)
    count = passes(model)
    assert model.generate(None, QUESTION, stop=("not there", word)) == text_of(model, tokens[:place])
    assert count["all"] == place + 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tempratur": 1.0}, "did you mean `temperature`"),
        ({"do_sample": True}, "no option `do_sample`"),
        ({"max_new_tokens": 0}, "`max_new_tokens` of at least 1, got 0"),
        ({"temperature": float("nan")}, "`temperature` of at least 0, got nan"),
        ({"temperature": -1.0}, "`temperature` of at least 0"),
        ({"top_p": 0.0, "temperature": 1.0}, "`top_p` above 0"),
        ({"top_k": 5}, "but `temperature` is 0"),
        ({"beams": 2, "temperature": 1.0}, "got both"),
        ({"stop": [""]}, "texts as `stop`"),
        ({"seed": -1}, "`seed` of at least 0"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        GenerationSpec().with_options(options)


def test_context_is_that_of_a_stretched_model(tiny_world: TinyWorld) -> None:
    config = tiny_world.stock().config
    config.rope_parameters = {**config.rope_parameters, "factor": 4.0, "original_max_position_embeddings": 100}
    assert context_of(config) == 400
    assert context_of(MambaConfig()) is None
