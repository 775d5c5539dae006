"""What a model still knows: against transformers alone, plain loops and models that did change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli_runs import error_of
from helpers.tiny_world import TinyWorld, make_plan, perturb

from moextend_pl import cli
from moextend_pl.contracts import UserError
from moextend_pl.evaluation.retention import Retention, base_logits, closed_logits, know, measure
from moextend_pl.evaluation.retention_texts import Choice, TextSet, batches, choice_rows, read_texts, text_rows
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend

TEXT = "a small picture is red . what is the color ? is it blue ? no yes picture is green . a small a small"
QUESTION = {"question": "picture is red . what is the color ?", "choices": ["red", "blue . is it"], "answer": "A"}
PARTS = ("projector", "new_experts", "new_routers", "calibration")


@pytest.fixture
def texts(tmp_path: Path) -> list[TextSet]:
    (tmp_path / "prose.txt").write_text(TEXT)
    hellaswag = {"ctx": "a small picture", "endings": ["is red .", "what is", "the color"], "label": "2"}
    (tmp_path / "quiz.jsonl").write_text(json.dumps(QUESTION) + "\n" + json.dumps(hellaswag) + "\n")
    return [read_texts(tmp_path / "prose.txt"), read_texts(tmp_path / "quiz.jsonl")]


def grown(world: TinyWorld, **options: Any) -> MoExtend:
    model = world.model(make_plan(**options), PARTS)
    perturb([p for name in PARTS for p in model.parts()[name]])
    return model


def by_loop(world: TinyWorld, ids: list[int], first: int) -> float:
    """Log-probabilities from transformers alone, one token at a time and nothing but what stands before it."""
    stock, total = world.stock(), 0.0
    for place in range(first, len(ids)):
        with torch.no_grad():
            logits = stock(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[ids[place]].item()
    return total


def test_every_token_but_the_first_is_predicted_once(tiny_world: TinyWorld) -> None:
    tokenizer = tiny_world.language().tokenizer
    ids = tokenizer(TEXT)["input_ids"]
    rows = text_rows([TEXT], tokenizer, 5)
    assert [token for row in rows for token in row.ids[1:]] == ids[1:]
    assert all(row.first == 1 and 2 <= len(row.ids) <= 6 for row in rows)
    places = [place for group, *_ in batches(rows, 12) for place in group]
    assert sorted(places) == list(range(len(rows)))
    assert all(ids.numel() <= 12 for _, ids, *_ in batches(rows, 12))


def test_perplexity_and_choices_are_those_of_transformers_alone(tiny_world: TinyWorld, texts: list[TextSet]) -> None:
    model = grown(tiny_world)
    tokenizer = model.language.tokenizer
    prose, quiz = measure(model, texts)
    ids = tokenizer(TEXT)["input_ids"]
    expected = math.exp(-by_loop(tiny_world, ids, 1) / (len(ids) - 1))
    assert prose.base.perplexity == pytest.approx(expected, rel=1e-5)
    right = normed = 0
    for choice in texts[1].choices:
        start = len(tokenizer(choice.prompt)["input_ids"])
        scores = [by_loop(tiny_world, tokenizer(f"{choice.prompt} {end}")["input_ids"], start) for end in choice.ends]
        by_length = [score / len(end) for score, end in zip(scores, choice.ends, strict=True)]
        right += scores.index(max(scores)) == choice.right
        normed += by_length.index(max(by_length)) == choice.right
    assert (quiz.base.accuracy, quiz.base.accuracy_norm) == (right / 2, normed / 2)
    assert quiz.base.perplexity is prose.base.accuracy is None


def test_masked_extension_keeps_every_text_logit(tiny_world: TinyWorld, texts: list[TextSet]) -> None:
    for found in measure(grown(tiny_world, routing="masked"), texts):
        assert found.base == found.extended
        assert found.drift.identical
        assert (found.drift.largest, found.drift.divergence, found.drift.same_choice) == (0, 0, 1)
        assert found.chose_new == 0
        assert set(found.chose_new_by_layer.values()) == {0.0}


def test_open_extension_is_seen_to_drift(tiny_world: TinyWorld, texts: list[TextSet]) -> None:
    model = grown(tiny_world, routing="open", init="copy")
    prose = measure(model, texts)[0]
    batch: Any = {"input_ids": torch.tensor([model.language.tokenizer(TEXT)["input_ids"]])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with torch.no_grad(), model.language.watch.recording() as records:
        after = model.language(batch)[0]
    before = tiny_world.stock()(input_ids=batch["input_ids"]).logits[0]
    assert not prose.drift.identical
    assert prose.drift.largest == pytest.approx((after - before).abs().max().item(), rel=1e-4)
    divergence = torch.nn.functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True,
                                            reduction="batchmean")  # fmt: skip
    assert prose.drift.divergence == pytest.approx(divergence.item(), rel=1e-3)
    assert prose.drift.same_choice == pytest.approx((after.argmax(-1) == before.argmax(-1)).float().mean().item())
    chose = [{t for t, row in enumerate(r.indices.tolist()) if 4 in row} for r in records if r.layer in (0, 2)]
    assert prose.chose_new == pytest.approx(len(chose[0] | chose[1]) / len(after))
    assert prose.chose_new_by_layer == pytest.approx({0: len(chose[0]) / len(after), 2: len(chose[1]) / len(after)})
    assert prose.chose_new > 0
    assert prose.base.perplexity != prose.extended.perplexity


def test_closed_model_is_the_base_bit_for_bit(tiny_world: TinyWorld) -> None:
    model = grown(tiny_world, routing="open", init="copy")
    ids = torch.tensor([model.language.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        closed = closed_logits(model.language)(ids, torch.ones_like(ids))
    mask = torch.ones_like(ids)
    assert torch.equal(closed, tiny_world.stock()(input_ids=ids, attention_mask=mask).logits)


def test_base_is_read_afresh_where_its_own_weights_learned(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = tiny_world.model(None, ("projector", "language", "routers"))
    perturb(model.parts()["language"], size=0.05)
    save_delta(model, tmp_path / "run")
    trained = MoExtend.load(tmp_path / "run")
    ids = torch.tensor([trained.language.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        base = base_logits(trained)(ids, torch.ones_like(ids))
        assert torch.equal(base, tiny_world.stock()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
        assert not torch.equal(base, closed_logits(trained.language)(ids, torch.ones_like(ids)))


def test_padding_changes_no_number(tiny_world: TinyWorld) -> None:
    language = tiny_world.language()
    documents = tuple(TEXT[: 20 + 11 * n] for n in range(6))
    one = [know(TextSet("x", (text,), ()), language.tokenizer, closed_logits(language), language.device).perplexity
           for text in documents]  # fmt: skip
    counts = [len(language.tokenizer(text)["input_ids"]) - 1 for text in documents]
    together = know(TextSet("x", documents, ()), language.tokenizer, closed_logits(language), language.device)
    expected = math.exp(sum(math.log(p or 0) * n for p, n in zip(one, counts, strict=True)) / sum(counts))
    assert together.perplexity == pytest.approx(expected, rel=1e-5)


def test_end_joined_to_its_question_still_counts_a_token(tiny_world: TinyWorld) -> None:
    rows = choice_rows(Choice("a small", ("", "red"), 0), tiny_world.language().tokenizer)
    assert all(1 <= row.first < len(row.ids) for row in rows)


def test_only_the_end_of_a_question_counts(tiny_world: TinyWorld) -> None:
    tokenizer = tiny_world.language().tokenizer
    rows = choice_rows(Choice("what is the color ?", ("red", "a small picture"), 0), tokenizer)
    before = len(tokenizer("what is the color ?")["input_ids"])
    for places, _, mask, counted in batches(rows, 100):
        for number, place in enumerate(places):
            expected = [before <= at < len(rows[place].ids) for at in range(mask.shape[1])]
            assert counted[number].bool().tolist() == expected
            assert int(mask[number].sum()) == len(rows[place].ids)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "found none"),
        ('{"question": "x", "choices": ["a"], "answer": "B"}\n', r"entry 1: expected `text`"),
        ('{"question": "x", "choices": "ab", "answer": 0}\n', "expected `text`"),
        ('{"ctx": "x", "endings": ["a", "b"], "label": ""}\n', "got ctx, endings, label"),
        ("{}\n", "expected `text`"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        read_texts(tmp_path / "x.jsonl")


def test_command_prints_base_beside_extended(
    tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: list[TextSet]
) -> None:
    run = tmp_path / "run"
    save_delta(grown(tiny_world, routing="masked"), run)
    assert (
        cli.main(["evaluate", str(run), "--retention", str(tmp_path / "prose.txt"), str(tmp_path / "quiz.jsonl")]) == 0
    )
    out = capsys.readouterr().out
    assert "prose" in out
    assert "identical logits" in out
    found = json.loads((run / "evaluation" / "retention.json").read_text())
    assert list(found) == ["prose", "quiz"]
    assert found["prose"]["base"]["perplexity"] == found["prose"]["extended"]["perplexity"] > 1
    assert "found no file" in error_of(capsys, ["evaluate", str(run), "--retention", "nowhere.txt"])
    assert "got neither" in error_of(capsys, ["evaluate", str(run)])
    assert "Expected --data" in error_of(capsys, ["evaluate", str(run), "--tasks", "own"])
    assert Retention("x").to_dict()["drift"]["identical"]
