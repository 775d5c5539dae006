"""Predictions: written as they come; a run that was killed goes on, and never with answers of another making."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.asked import passes
from helpers.tiny_world import SAMPLES, TinyWorld, perturb
from lightning.pytorch import Callback, Trainer

from callbacks.predictions import WritePredictions
from moextend_pl.contracts import UserError
from moextend_pl.inference.spec import GenerationSpec
from moextend_pl.models.moextend import MoExtend

BATCH = 7  # 24 samples: four batches, the last one of 3


class KilledError(Exception):
    """The process is gone."""


class KillAt(Callback):
    """Ends a run behind a batch."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_predict_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError


def short(world: TinyWorld, longest: int = 2) -> MoExtend:
    model = world.model(parts=["projector"])
    model.language.generation = GenerationSpec(max_new_tokens=longest)
    return model


@pytest.fixture
def predict(tiny_world: TinyWorld, make_trainer: Callable[..., Trainer]) -> Callable[..., MoExtend]:
    own = short(tiny_world)

    def start(*callbacks: Callback, model: MoExtend | None = None, options: Any = None, **data: Any) -> MoExtend:
        chosen = model or own
        sets = {"words": tiny_world.data("text", "test"), "again": tiny_world.data("text")}
        module = tiny_world.datamodule(None, **{"predict": sets, "batch_size": BATCH, "turns": "together", **data})
        make_trainer(WritePredictions(), *callbacks, **(options or {})).predict(chosen, module)
        return chosen

    return start


def written(run: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(run.glob("predictions_*"))}


@pytest.mark.parametrize("at", [1, 5])
def test_a_killed_run_goes_on_where_it_stopped_and_ends_as_one_that_was_not(
    predict: Callable[..., MoExtend], tmp_path: Path, at: int
) -> None:
    run = tmp_path / "run"
    predict()
    whole = written(run)
    assert sorted(whole) == ["predictions_again.jsonl", "predictions_words.jsonl"]
    keys = [json.loads(line)["key"] for line in whole["predictions_words.jsonl"].splitlines()]
    assert keys == [f"t{n:03d}" for n in range(SAMPLES, 2 * SAMPLES)]
    for path in run.iterdir():
        path.unlink()
    with pytest.raises(KilledError):
        predict(KillAt(at))
    assert not (run / "predictions_again.jsonl").exists()
    part = next(run.glob("*again*.part" if at > 3 else "*words*.part"))
    part.write_text(part.read_text() + '{"key": "t0')  # a line that was being written
    batches: list[int] = []
    counter = Callback()
    counter.on_predict_batch_end = lambda *_, **__: batches.append(1)
    predict(counter)
    assert written(run) == whole
    # of eight batches; the last one of a finished set is answered again
    assert len(batches) == 8 - (at + 1) + (1 if at >= 3 else 0)


def test_answers_of_another_making_are_never_joined(
    tiny_world: TinyWorld, predict: Callable[..., MoExtend], tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        predict(KillAt(1))
    before = written(tmp_path / "run")
    other, longer = short(tiny_world), short(tiny_world, 5)
    perturb(other.parts()["projector"])
    for changed, words in (
        ({"model": other}, "weights was"),
        ({"model": longer}, "generation.max_new_tokens was 2, now 5"),
        ({"batch_size": 3}, "data.batch_size was 7, now 3"),
        ({"predict": {"words": tiny_world.data("text", "train")}}, "data.shards was"),
    ):
        count = passes(changed.get("model", other))
        with pytest.raises(UserError, match=words):
            predict(**changed)
        assert written(tmp_path / "run") == before
        assert not count
    (tmp_path / "run" / "predictions_words.jsonl.part").unlink()
    predict(model=other)


def test_a_run_of_a_few_batches_begins_anew(predict: Callable[..., MoExtend], tmp_path: Path) -> None:
    for _ in range(2):
        predict(options={"limit_predict_batches": 2})
        assert len((tmp_path / "run" / "predictions_words.jsonl").read_text().splitlines()) == 2 * BATCH
    with pytest.raises(KilledError):
        predict(KillAt(1))
    predict(options={"limit_predict_batches": 1})
    assert len((tmp_path / "run" / "predictions_words.jsonl").read_text().splitlines()) == BATCH


def test_a_test_leaves_the_beginning_of_predictions_alone(
    tiny_world: TinyWorld, predict: Callable[..., MoExtend], make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        predict(KillAt(1))
    part = tmp_path / "run" / "predictions_words.jsonl.part"
    before = part.read_bytes()
    assert before
    data = tiny_world.datamodule(None, test={"words": tiny_world.data("text")}, batch_size=BATCH, turns="together")
    make_trainer(WritePredictions(), limit_test_batches=1).test(short(tiny_world), data)
    assert part.read_bytes() == before
