"""What stands beside an answer is what the routers did and what the base says, for whoever asks and however many."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.asked import extended, shown
from helpers.tiles import SIZES, photo, tiled, write_tagged_base
from helpers.tiny_world import EXPERTS, LAYERS, QUESTION, TinyWorld, make_plan, perturb
from PIL import Image

from moextend_pl.contracts import TrainPlan, UserError
from moextend_pl.export.demo.answers import Demonstration, Told, without_pictures
from moextend_pl.export.demo.conversation_html import conversation_html
from moextend_pl.export.demo.visit import Visit, next_turn
from moextend_pl.inference.chat import next_question
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.blocks import find_blocks
from moextend_pl.samples.messages import Question, ask

SECOND, NEW = "is it red ?", 5


@pytest.fixture(scope="module", params=["masked", "open"])
def model(request: pytest.FixtureRequest, tiny_world: TinyWorld) -> MoExtend:
    """Whose new experts take part in pictures only, or in texts too."""
    return extended(tiny_world, request.param)


def whole(demonstration: Demonstration, said: Question | None, text: str, *numbers: int) -> Told:
    *_, told = demonstration.ask(said, text, [shown(number) for number in numbers])
    return told


@torch.no_grad()
def stock_answer(stock: Any, model: MoExtend, question: Question) -> str:
    """Returns what transformers alone makes of the base's files and a prompt."""
    batch = model.prompt(question)
    given = {"inputs_embeds": model.embed(batch)} if question.pictures else {"input_ids": batch["input_ids"]}
    tokens = stock.generate(**given, do_sample=False, max_new_tokens=NEW)[0]
    new = tokens if question.pictures else tokens[batch["input_ids"].shape[1] :]
    return str(model.language.tokenizer.decode(new, skip_special_tokens=True)).strip()


def test_answers_are_those_of_generate_and_the_base_s_those_of_transformers(
    model: MoExtend, tiny_world: TinyWorld
) -> None:
    demonstration, stock, differ = Demonstration(model, max_new_tokens=NEW), tiny_world.stock(), set()
    for number in range(2):
        first = whole(demonstration, None, QUESTION, number)
        second = whole(demonstration, first.said, SECOND)
        question = next_question(None, QUESTION, [shown(number)])
        for told, asked in ((first, question), (second, next_question(first.said, SECOND))):
            assert told.answer == model.answers([asked], spec=demonstration.spec)[0]
            assert told.base == stock_answer(stock, model, asked)
            assert told.blind == stock_answer(stock, model, without_pictures(asked))
            differ |= {told.answer == told.base, told.base == told.blind}
    assert False in differ
    alone = whole(demonstration, None, QUESTION)
    assert (alone.base, alone.blind) == (stock_answer(stock, model, next_question(None, QUESTION)), None)
    if model.plans[0].routing == "masked":
        assert alone.answer == alone.base


@pytest.mark.parametrize("thumbnail", [False, True], ids=["X", "H"])
def test_the_base_looks_at_pictures_by_the_layers_that_the_run_gave_it(
    tiny_world: TinyWorld, tmp_path: Path, thumbnail: bool
) -> None:
    looking = tiled(tiny_world, write_tagged_base(tiny_world, tmp_path / "base"), looks=1, thumbnail=thumbnail)
    looking.extension_plan, looking.train_plan = make_plan(init="preserving"), TrainPlan(("projector",))
    looking.configure_model()
    perturb(looking.parts()["projector"], 0.3)
    demonstration = Demonstration(looking, max_new_tokens=NEW)
    *_, told = demonstration.ask(None, QUESTION, [photo(SIZES[2])])
    assert told.answer == told.base != told.blind  # new experts that did not learn
    batch = looking.prompt(ask(QUESTION, [photo(SIZES[2])]))
    assert told.chosen is not None
    assert told.chosen.tokens["image"] == int((batch["tiles"] > 0).sum())


def test_the_map_is_a_plain_count_of_what_reached_the_experts(model: MoExtend) -> None:
    seen: dict[int, list[list[int]]] = {layer: [] for layer in range(LAYERS)}
    handles = []
    for block in find_blocks(model.language.model):

        def hook(_: Any, inputs: tuple[Any, ...], layer: int = block.layer) -> None:
            seen[layer] += inputs[1].tolist()

        handles.append(block.experts.register_forward_pre_hook(hook))
    asked = Demonstration(model).ask(None, QUESTION, [shown(1), shown(2)])
    told = next(told for told in asked if told.chosen)
    for handle in handles:
        handle.remove()
    asked.close()
    assert told.chosen is not None
    assert told.said is not None
    places = model.prompt(next_question(None, QUESTION, [shown(1), shown(2)]))["input_ids"][0]
    is_image = (places == model.language.image_token_id).tolist()
    counts = {kind: {layer: [0] * (EXPERTS + 1) for layer in range(LAYERS)} for kind in ("image", "text")}
    for layer, tokens in seen.items():
        for place, chosen in enumerate(tokens):
            for expert in chosen:
                counts["image" if place < len(is_image) and is_image[place] else "text"][layer][expert] += 1
    assert {kind: {n: list(c) for n, c in layers.items()} for kind, layers in told.chosen.counts.items()} == counts
    assert told.chosen.tokens == {"image": sum(is_image), "text": len(seen[0]) - sum(is_image)}
    assert told.chosen.old == dict.fromkeys(range(LAYERS), EXPERTS)
    new = {layer: counts["image"][layer][EXPERTS] / sum(counts["image"][layer]) for layer in range(LAYERS)}
    assert max(new.values()) > 0
    assert {layer: told.chosen.new_share("image", layer) for layer in new} == pytest.approx(new)


def test_pieces_come_before_what_stands_beside_them(model: MoExtend) -> None:
    told = list(Demonstration(model, max_new_tokens=6).ask(None, QUESTION, [shown(0)]))
    assert all(later.answer.startswith(earlier.answer) for earlier, later in itertools.pairwise(told))
    assert told[0].said is None
    assert told[0].answer != told[-1].answer
    assert [(one.chosen is None, one.base is None, one.blind is None) for one in told[-3:]] == [
        (False, True, True),
        (False, False, True),
        (False, False, False),
    ]


def test_a_run_without_new_experts_is_its_own_base(tiny_world: TinyWorld) -> None:
    told = whole(Demonstration(tiny_world.model()), None, QUESTION, 0)
    assert (told.base, told.blind) == (None, None)
    assert told.chosen is not None
    assert {len(counts) for counts in told.chosen.counts["image"].values()} == {EXPERTS}


@pytest.mark.parametrize("parts", [("projector", "new_experts", "language"), ("projector", "routers")])
def test_a_base_that_learned_is_not_called_the_base(
    parts: tuple[str, ...], tiny_world: TinyWorld, tmp_path: Path
) -> None:
    trained = tiny_world.model(make_plan(init="copy"), parts)
    perturb([parameter for part in parts for parameter in trained.parts()[part]])
    save_delta(trained, tmp_path / "run")
    demonstration = Demonstration(MoExtend.load(tmp_path / "run"), max_new_tokens=2)
    *_, visit = next_turn(demonstration, Visit(), {"text": QUESTION})
    assert visit.turns[0].told.chosen is not None
    assert visit.turns[0].told.base is None
    assert "own weights learned" in conversation_html(visit.turns)


def test_a_base_without_experts_has_an_empty_map(tiny_world: TinyWorld) -> None:
    model = tiny_world.cumo()
    model.configure_model()
    told = whole(Demonstration(model, max_new_tokens=2), None, QUESTION, 0)
    assert told.chosen is not None
    assert (told.chosen.old, told.chosen.counts) == ({}, {"image": {}, "text": {}})


def test_two_visitors_at_once_are_kept_apart(tiny_world: TinyWorld) -> None:
    demonstration = Demonstration(extended(tiny_world), max_new_tokens=3)

    def visit(number: int) -> list[Told]:
        first = whole(demonstration, None, QUESTION, number)
        return [first, whole(demonstration, first.said, SECOND)]

    expected = [visit(number) for number in range(2)]
    with ThreadPoolExecutor(2) as visitors:
        found = list(visitors.map(visit, range(2)))
    for one, other in zip(expected, found, strict=True):
        assert [(t.answer, t.chosen, t.base, t.blind) for t in one] == [
            (t.answer, t.chosen, t.base, t.blind) for t in other
        ]


def test_who_goes_away_keeps_nobody_waiting(model: MoExtend) -> None:
    demonstration = Demonstration(model, max_new_tokens=60)
    gone = demonstration.ask(None, QUESTION, [shown(0)])
    next(gone)
    gone.close()
    assert whole(Demonstration(model, max_new_tokens=4), None, QUESTION).answer
    assert all(reach.nowhere for _, reach in model.language.extensions)


def test_an_answer_that_was_stopped_is_no_part_of_the_conversation(model: MoExtend) -> None:
    demonstration = Demonstration(model, max_new_tokens=6)
    *_, first = next_turn(demonstration, Visit(), {"text": QUESTION})
    stopped = next(next_turn(demonstration, first, {"text": SECOND}))
    assert (len(stopped.turns), stopped.said) == (2, first.said)
    *_, again = next_turn(demonstration, stopped, {"text": SECOND})
    assert [turn.question for turn in again.turns] == [QUESTION, SECOND]
    assert again.said is not None
    assert len(again.said.turns) == 2


def test_mistakes_stand_in_their_turn_and_the_conversation_goes_on(tiny_world: TinyWorld, tmp_path: Path) -> None:
    demonstration = Demonstration(tiny_world.model(make_plan()), max_new_tokens=2)
    bad, many, good = (tmp_path / name for name in ("bad.png", "many.png", "good.png"))
    bad.write_bytes(b"no picture")
    Image.new("1", (9000, 9000)).save(many)
    shown(1).save(good)
    visit = Visit()
    for text, files, sentence in (
        (QUESTION, [str(bad)], "bad.png: expected an image as PNG, JPEG, WEBP"),
        (QUESTION, [str(many)], "many.png: expected at most 64000000 pixels, got 9000 x 9000. Shrink the image."),
        ("", [], "Expected a question, got an empty text."),
        ("small " * 200, [], "fewer positions than the model's context, 128"),
    ):
        *_, visit = next_turn(demonstration, visit, {"text": text, "files": files})
        assert sentence in visit.turns[-1].problem
        assert visit.said is None
    for files, turns in (([str(good)], 1), ([], 2)):
        *_, visit = next_turn(demonstration, visit, {"text": QUESTION, "files": files})
        assert visit.said is not None
        assert len(visit.said.turns) == turns
    assert len(visit.turns) == 6
    assert visit.turns[4].pictures[0].startswith("data:image/png;base64,")
    with pytest.raises(UserError, match="max_new_tokens"):
        Demonstration(demonstration.model, max_new_tokens=0)
    with pytest.raises(UserError, match="Expected no `reduce` beside a map of experts, .* got 'aim'"):
        Demonstration(demonstration.model, reduce="aim")
