"""What a stage writes when it ends."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_world import SAMPLES, TinyWorld, colour_of, make_plan, perturb
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file
from transformers import MistralForCausalLM, MixtralForCausalLM

from callbacks.checkpoints import StageCheckpoint
from callbacks.outputs import SaveDelta, SavePretrained, StageReceipt
from callbacks.predictions import WritePredictions
from callbacks.train_only import TrainOnly
from moextend_pl.contracts import TrainPlan, UpcycleSpec, UserError
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.metrics_log import RunLogger
from moextend_pl.training.answers import exact_match


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_receipt_lists_the_digest_of_every_output(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "folder" / "deeper").mkdir(parents=True)
    (run / "folder" / "deeper" / "a.txt").write_text("a")
    callbacks = [SaveDelta(), StageReceipt(["delta.safetensors", "manifest.json", "folder"])]
    make_trainer(TrainOnly(["projector"]), *callbacks, steps=3).fit(tiny_world.unbuilt(), tiny_world.datamodule())
    receipt = json.loads((run / "stage.json").read_text())
    names = ["delta.safetensors", "folder/deeper/a.txt", "manifest.json"]
    assert receipt["outputs"] == {name: sha256(run / name) for name in names}
    assert receipt["steps"] == 3
    assert receipt["seconds"] > 0
    assert receipt["peak_memory_gb"] > 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 3


def test_seconds_of_earlier_starts_are_added() -> None:
    receipt = StageReceipt([])
    receipt.load_state_dict({"seconds": 100.0})
    receipt.on_fit_start(None, None)
    assert 100.0 <= receipt.state_dict()["seconds"] < 101.0


def test_checkpoints_come_at_their_steps_but_never_at_the_last(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trainer = make_trainer(TrainOnly(["projector"]), StageCheckpoint(2), steps=6, enable_checkpointing=True)
    trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule())
    saved = torch.load(path, weights_only=False)
    assert saved["global_step"] == 4
    before = path.with_name("previous.ckpt")
    assert torch.load(before, weights_only=False)["global_step"] == 2
    assert sorted(path.parent.iterdir()) == [path, before]


def test_a_disk_without_room_for_checkpoints_is_refused_before_the_first_step(
    tiny_world: TinyWorld, make_trainer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    trainer = make_trainer(TrainOnly(["projector"]), StageCheckpoint(2), enable_checkpointing=True)
    with pytest.raises(UserError, match=r"GB for 3 checkpoints in .*checkpoints, found 0.0 GB free"):
        trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule())
    assert trainer.global_step == 0


class LogsNothingMore(RunLogger):
    """Ends the process where a step's metrics are logged, as a kill would."""

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if step == 3:
            raise KeyboardInterrupt
        super().log_metrics(metrics, step)


def test_checkpoint_takes_its_place_only_when_the_metrics_of_its_step_are_written(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    parts = [TrainOnly(["projector"]), StageCheckpoint(2)]
    options = {"steps": 8, "enable_checkpointing": True, "log_every_n_steps": 1}
    trainer = make_trainer(*parts, logger=LogsNothingMore(str(tmp_path / "run")), **options)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule())
    # The step whose row is lost is taken again.
    assert torch.load(last, weights_only=True)["global_step"] == 2
    trainer = make_trainer(*parts, logger=RunLogger(str(tmp_path / "run")), **options)
    trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule(), ckpt_path=last, weights_only=True)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert {row["step"] for row in csv.DictReader(file) if row["train/loss"]} == {str(n) for n in range(8)}


class EndsInValidation(Callback):
    """Ends the process in the validation after a step that is saved, as a kill would."""

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            raise KeyboardInterrupt


def test_checkpoint_takes_its_place_only_when_the_validation_after_its_step_is_written(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"

    def fit(*more: Callback, checkpoint: Path | None = None) -> None:
        options = {"steps": 6, "enable_checkpointing": True, "val_check_interval": 2}
        logger = RunLogger(str(tmp_path / "run"))
        trainer = make_trainer(TrainOnly(["projector"]), StageCheckpoint(2), *more, logger=logger, **options)
        data = tiny_world.datamodule(val=tiny_world.data("vqa", "test"))
        trainer.fit(tiny_world.unbuilt(), data, ckpt_path=checkpoint, weights_only=True)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(EndsInValidation())
    assert torch.load(last, weights_only=True)["global_step"] == 2
    fit(checkpoint=last)
    assert torch.load(last, weights_only=True)["global_step"] == 4
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["val/loss"]] == ["1", "3", "5"]


def test_an_unfinished_stage_that_is_past_its_steps_does_not_end_without_a_result(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"

    def fit(steps: int, *more: Callback, checkpoint: Path | None = None) -> None:
        trainer = make_trainer(TrainOnly(["projector"]), *more, steps=steps, enable_checkpointing=True)
        trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule(), ckpt_path=checkpoint, weights_only=True)

    fit(6, StageCheckpoint(4))  # as if it had been killed after its checkpoint
    for steps in (3, 4):
        with pytest.raises(UserError, match=rf"`trainer.max_steps` above 4, .* got {steps}: nothing would be trained"):
            fit(steps, StageReceipt([]), checkpoint=last)
    fit(5, StageReceipt([]), checkpoint=last)
    fit(5, StageReceipt([]), checkpoint=last)  # finished: nothing is left to do, and nothing is wrong
    assert json.loads((tmp_path / "run" / "stage.json").read_text())["steps"] == 5


def test_resume_checkpoint_holds_no_frozen_weight(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    model = tiny_world.unbuilt()
    model.extension_plan = make_plan()
    trainer = make_trainer(
        TrainOnly(["projector", "new_experts"]), StageCheckpoint(2), steps=4, enable_checkpointing=True
    )
    trainer.fit(model, tiny_world.datamodule())
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning <= set(saved["state_dict"])
    assert not frozen & set(saved["state_dict"])
    assert len(saved["optimizer_states"][0]["state"]) == len(learning)


class StopAt(Callback):
    """Ends a run after some steps, with whatever checkpoint it has by then."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def test_resumed_run_takes_the_same_steps(tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path) -> None:
    def run(folder: str, *more: Callback, checkpoint: Path | None = None) -> MoExtend:
        model = tiny_world.unbuilt()
        model.extension_plan = make_plan()
        callbacks = [TrainOnly(["projector", "new_experts", "new_routers", "calibration"]), StageCheckpoint(3), *more]
        options = {"enable_checkpointing": True, "default_root_dir": tmp_path / folder}
        trainer = make_trainer(*callbacks, steps=8, **options)
        trainer.fit(model, tiny_world.datamodule(), ckpt_path=checkpoint, weights_only=False)
        assert trainer.global_step == (5 if more else 8)
        return model

    whole = run("whole")
    run("cut", StopAt(5))
    resumed = run("resumed", checkpoint=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_predictions_hold_a_row_for_each_question_of_each_set(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    model = tiny_world.model(parts=["projector"])
    sets = {"pictures": tiny_world.data("vqa", "test"), "words": tiny_world.data("text", "test")}
    data = tiny_world.datamodule(None, test=sets, batch_size=5)
    logged = make_trainer(WritePredictions()).test(model, data, verbose=False)
    metrics = {name: value for part in logged for name, value in part.items()}
    for name, turns, letter in (("pictures", 2, "i"), ("words", 1, "t")):
        text = (tmp_path / "run" / f"predictions_{name}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        numbers = range(SAMPLES, 2 * SAMPLES)
        assert [row["key"] for row in rows] == [f"{letter}{n:03d}#{t}" for n in numbers for t in range(turns)]
        assert [row["answer"] for row in rows][::turns] == [colour_of(n) for n in numbers]
        assert all(row["correct"] == exact_match(row["prediction"], row["answer"]) for row in rows)
        accuracy = sum(row["correct"] for row in rows) / len(rows)
        assert metrics[f"test/{name}_accuracy"] == pytest.approx(accuracy)


def test_trained_language_model_is_saved_where_transformers_finds_it(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    model = MoELanguageModel(base=str(tiny_world.base))
    make_trainer(SavePretrained("base"), steps=2).fit(model, tiny_world.datamodule("text", val=None))
    loaded = TinyWorld(tmp_path / "run").stock()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.model.parameters(), strict=True))
    assert not torch.equal(loaded.lm_head.weight, tiny_world.stock().lm_head.weight)


@torch.no_grad()
def test_an_upcycled_model_is_saved_as_the_mixtral_that_computes_what_the_dense_one_does(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    model = MoELanguageModel(base=str(tiny_world.dense), upcycle=UpcycleSpec(experts=4, top_k=2))
    callbacks = TrainOnly(parts=["routers"]), SavePretrained("base")
    with torch.enable_grad():
        make_trainer(*callbacks, steps=2).fit(model, tiny_world.datamodule("text", val=None))
    tokens = torch.arange(1, 20)[None]
    saved = MixtralForCausalLM.from_pretrained(tmp_path / "run" / "base")
    assert (saved.config.num_local_experts, saved.config.num_experts_per_tok) == (4, 2)
    # Routers have learned and experts are copies: two weights that sum to 1, to rounding.
    dense = MistralForCausalLM.from_pretrained(tiny_world.dense)
    torch.testing.assert_close(saved(tokens).logits, dense(tokens).logits, atol=1e-5, rtol=1e-5)
    # Also where experts are copies no more.
    perturb(list(model.model.parameters()), 0.1)
    model.eval().save_pretrained(tmp_path / "learned")
    learned = MixtralForCausalLM.from_pretrained(tmp_path / "learned")
    torch.testing.assert_close(learned(tokens).logits, model.model(tokens).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(learned(tokens).logits, dense(tokens).logits, atol=1e-2)


def test_a_language_model_that_transformers_could_not_read_again_is_refused_before_its_first_step(
    tiny_world: TinyWorld, make_trainer: Callable
) -> None:
    trainer, data = make_trainer(SavePretrained("base")), tiny_world.datamodule("text", val=None)
    upcycled = MoELanguageModel(base=str(tiny_world.dense), upcycle=UpcycleSpec(layers=(0,)))
    with pytest.raises(UserError, match=r"cannot write an upcycled language model.*leave out `language.upcycle`"):
        trainer.fit(upcycled, data)
    assert not hasattr(upcycled, "model")
    extended = MoELanguageModel(base=str(tiny_world.base))
    extended.extension_plan = make_plan(routing="open")
    with pytest.raises(UserError, match=r"cannot write an extended language model.*leave out `ExpertExtension.plan`"):
        trainer.fit(extended, data)
    assert trainer.global_step == 0


def test_what_is_saved_fits_the_callback_that_saves_it(tiny_world: TinyWorld, make_trainer: Callable) -> None:
    language, whole = MoELanguageModel(base=str(tiny_world.base)), tiny_world.unbuilt()
    with pytest.raises(UserError, match=r"moextend_pl.MoExtend has learned, got MoELanguageModel. Use SavePretrained"):
        make_trainer(SaveDelta()).fit(language, tiny_world.datamodule("text", val=None))
    with pytest.raises(UserError, match=r"a tower or a language model, got MoExtend"):
        make_trainer(SavePretrained("base")).fit(whole, tiny_world.datamodule("vqa"))
    assert not hasattr(language, "model")
    assert not hasattr(whole.language, "model")


def test_trained_tower_is_saved_and_learned(tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path) -> None:
    model = VisionEncoder(path=str(tiny_world.encoder), tokenizer=str(tiny_world.base), embedding_dim=8)
    model.train_plan = TrainPlan(("encoder", "heads"))
    make_trainer(SavePretrained("encoder"), steps=2).fit(model, tiny_world.datamodule("vqa"))
    saved = load_file(tmp_path / "run" / "encoder" / "encoder.safetensors")
    before = load_file(tiny_world.encoder / "encoder.safetensors")
    assert saved.keys() == before.keys()
    assert not torch.equal(saved["conv1.0.weight"], before["conv1.0.weight"])
    assert all(torch.equal(value, saved[name]) for name, value in model.tower.state_dict().items())
