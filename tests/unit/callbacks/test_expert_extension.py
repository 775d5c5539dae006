"""The probe picks layers and puts the routers back; the extend run grows exactly the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import EXPERTS, TinyWorld, make_plan
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor

from callbacks.expert_extension import ExpertExtension
from callbacks.frozen_guard import FrozenGuard
from callbacks.outputs import StageReceipt
from callbacks.train_only import TrainOnly
from callbacks.usage_report import UsageReport, measure_usage
from datamodules.mixture import ShardSet
from moextend_pl.contracts import ExtensionPlan, UserError
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.blocks import find_blocks
from moextend_pl.moe.extension.growth import router_parameters
from moextend_pl.moe.selection import AllLayers, ExplicitLayers, ShiftRule


def as_counts(usage: dict, moment: str, kind: str) -> dict[int, Tensor]:
    return {int(layer): torch.tensor(counts) for layer, counts in usage[moment][kind].items()}


def is_drawn(path: Path) -> bool:
    with Image.open(path) as image:
        return image.width > 100 and len(image.convert("RGB").getcolors(2**24)) > 10


@pytest.fixture
def probed(tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path) -> tuple[MoExtend, Path]:
    model = tiny_world.unbuilt()
    model.optim = type(model.optim)(lr=0.3)
    rule = ExpertExtension(rule=ShiftRule(0.7), new_experts=2, routing="open")
    make_trainer(TrainOnly(["routers"]), FrozenGuard(), rule, steps=5).fit(model, tiny_world.datamodule("vqa"))
    return model, tmp_path / "run"


def test_probe_puts_every_weight_back(probed: tuple[MoExtend, Path], tiny_world: TinyWorld) -> None:
    model, _ = probed
    expected = tiny_world.unbuilt()
    expected.configure_model()
    state = expected.state_dict()
    assert len(router_parameters(model.language.model)) == 3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_probe_leaves_every_part_in_the_mode_it_was_in(probed: tuple[MoExtend, Path]) -> None:
    model, _ = probed
    assert not any(part.training for part in model.encoder.modules())
    assert model.language.model.training


def test_probe_plan_is_the_rule_applied_to_the_written_usage(probed: tuple[MoExtend, Path]) -> None:
    _, run = probed
    plan = ExtensionPlan.load(run / "extension_plan.yaml")
    usage = json.loads((run / "usage.json").read_text())
    before, after = as_counts(usage, "before", "all"), as_counts(usage, "after", "all")
    assert any(not torch.equal(before[layer], after[layer]) for layer in before)
    assert [growth.layer for growth in plan.layers] == ShiftRule(0.7).choose(before, after)
    for growth in plan.layers:
        order = sorted(range(EXPERTS), key=lambda e: -int(after[growth.layer][e]))
        assert growth.sources == tuple(order[:2])
    assert plan.routing == "open"
    assert plan.report["scores"] == pytest.approx(ShiftRule().scores(before, after), abs=1e-6)


def test_random_sources_are_those_of_the_seed_whatever_was_used() -> None:
    used = {"all": {0: torch.tensor([9, 1, 1, 1]), 1: torch.tensor([9, 1, 1, 1])}}
    plans = [
        ExpertExtension(rule=AllLayers(), source="random", seed=seed).choose(used, used) for seed in (0, 0, 1, 2, 3)
    ]
    sources = [[growth.sources for growth in plan.layers] for plan in plans]
    assert sources[0] == sources[1]
    assert any(growth != sources[0] for growth in sources[2:])
    assert any(source != (0,) for growth in sources for source in growth)


def test_probe_counts_every_token_of_the_validation_set_once(
    probed: tuple[MoExtend, Path], tiny_world: TinyWorld
) -> None:
    model, run = probed
    usage = json.loads((run / "usage.json").read_text())
    data = tiny_world.datamodule("vqa", spec=model.sample_spec())
    data.setup("fit")
    image = text = 0
    for batch in data.val_dataloader():
        marks = batch["input_ids"] == model.language.image_token_id
        image += int(marks.sum())
        text += int((batch["attention_mask"].bool() & ~marks).sum())
    for layer in range(3):
        for moment in ("before", "after"):
            assert sum(usage[moment]["image"][str(layer)]) == 2 * image
            assert sum(usage[moment]["text"][str(layer)]) == 2 * text


def test_probe_draws_its_plots(probed: tuple[MoExtend, Path]) -> None:
    _, run = probed
    assert is_drawn(run / "plots" / "usage.png")
    assert is_drawn(run / "plots" / "shift.png")


def test_measuring_usage_changes_neither_modes_nor_weights_nor_statistics(
    tiny_world: TinyWorld, make_trainer: Callable
) -> None:
    model = tiny_world.model(parts=["routers"])
    model.language.model.train()
    trainer = make_trainer()
    data = tiny_world.datamodule("vqa", spec=model.sample_spec())
    trainer.datamodule = data
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    first, second = measure_usage(trainer, model), measure_usage(trainer, model)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(first["all"][layer], second["all"][layer]) for layer in range(3))


def test_usage_of_all_ranks_together_is_that_of_one(
    tiny_world: TinyWorld, make_trainer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, trainer = tiny_world.model(), make_trainer()
    # 21 samples in batches of 4: nothing of the last one is left for the second rank but a filler.
    trainer.datamodule = tiny_world.datamodule("vqa", val_samples=21, spec=model.sample_spec())
    one = measure_usage(trainer, model)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(trainer.datamodule, "_ranks", lambda rank=rank: (rank, 2))
        ranks.append(measure_usage(trainer, model))
    for kind, layers in one.items():
        for layer, counts in layers.items():
            assert torch.equal(counts, ranks[0][kind][layer] + ranks[1][kind][layer])


def test_resumed_probe_keeps_what_was_measured_before_the_first_step(
    tiny_world: TinyWorld, make_trainer: Callable
) -> None:
    model = tiny_world.model(parts=["routers"])
    trainer = make_trainer()
    trainer.datamodule = tiny_world.datamodule("vqa", spec=model.sample_spec())
    first = ExpertExtension(rule=AllLayers())
    first.on_train_start(trainer, model)
    second = ExpertExtension(rule=AllLayers())
    second.load_state_dict(first.state_dict())
    originals = [p.detach().clone() for p in router_parameters(model.language.model)]
    with torch.no_grad():
        for parameter in router_parameters(model.language.model):
            parameter.normal_()
    second.on_train_start(trainer, model)
    second.on_train_end(trainer, model)
    for parameter, original in zip(router_parameters(model.language.model), originals, strict=True):
        assert torch.equal(parameter, original)
    counts = second.state_dict()["before"]["all"]
    assert all(torch.equal(counts[layer], first.state_dict()["before"]["all"][layer]) for layer in range(3))


def test_a_probe_that_has_ended_is_not_continued(tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"

    def probe(steps: int, checkpoint: Path | None) -> None:
        callbacks = [TrainOnly(["routers"]), ExpertExtension(rule=AllLayers()), StageReceipt([])]
        trainer = make_trainer(*callbacks, steps=steps)
        trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule("vqa"), ckpt_path=checkpoint, weights_only=True)

    probe(2, None)
    written = (tmp_path / "run" / "usage.json").read_bytes()
    probe(2, last)  # nothing is left to do, and nothing is said
    with pytest.raises(UserError, match=r"ended at step 2: its routers were put back.*--fresh"):
        probe(4, last)
    assert (tmp_path / "run" / "usage.json").read_bytes() == written


@pytest.mark.parametrize("callback", [ExpertExtension(rule=AllLayers()), UsageReport()])
def test_usage_is_not_measured_without_a_validation_set(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path, callback: Callback
) -> None:
    trainer = make_trainer(TrainOnly(["routers"]), callback)
    with pytest.raises(UserError, match="Expected a validation set.*Set `val`"):
        trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule("vqa", val=None))
    assert not list(tmp_path.glob("run/*"))


def test_extend_run_grows_exactly_the_plan(tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path) -> None:
    make_plan([1], (3, 0), init="copy", routing="open").save(tmp_path / "plan.yaml")
    model = tiny_world.unbuilt()
    extension = ExpertExtension(plan=str(tmp_path / "plan.yaml"), init="preserving", seed=4)
    trainer = make_trainer(TrainOnly(["new_experts"]), extension, UsageReport(), steps=2)
    trainer.fit(model, tiny_world.datamodule())
    assert {b.layer: b.num_experts for b in find_blocks(model.language.model)} == {0: 4, 1: 6, 2: 4}
    assert model.extension_plan == make_plan([1], (3, 0), init="preserving", routing="open", seed=4)
    usage = json.loads((tmp_path / "run" / "usage.json").read_text())
    assert [len(usage["end"]["all"][str(layer)]) for layer in range(3)] == [4, 6, 4]
    assert sum(usage["end"]["image"]["1"][4:]) > 0
    assert is_drawn(tmp_path / "run" / "plots" / "usage.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of `rule`"),
        ({"rule": AllLayers(), "plan": "plan.yaml"}, "exactly one of `rule`"),
        ({"rule": AllLayers(), "source": "during"}, "after', 'before', 'random'], got 'during'"),
        ({"rule": AllLayers(), "new_experts": 0}, "`new_experts` >= 1, got 0"),
        ({"plan": "nowhere.yaml"}, "found no file. Run the probe stage first"),
        ({"plan": "nowhere.yaml", "new_experts": 2}, "belong to a probe run"),
        ({"plan": "nowhere.yaml", "source": "before"}, "belong to a probe run"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExpertExtension(**arguments)


@pytest.mark.parametrize(("routing", "train", "fits"), [
    ("masked", "", False),
    ("masked", "colours", False),
    ("masked_tokens", "", False),
    ("open", "", True),
    ("masked", "colour", True),
])  # fmt: skip
def test_a_plan_of_a_task_that_no_training_data_are_of_is_refused_before_the_model_is_built(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path, routing: str, train: str, fits: bool
) -> None:
    make_plan([1], task="colour", routing=routing).save(tmp_path / "plan.yaml")
    extension, model = ExpertExtension(plan=str(tmp_path / "plan.yaml")), tiny_world.unbuilt()
    data = tiny_world.datamodule(None)
    data.train = [tiny_world.data("text"), ShardSet(tiny_world.data("vqa"), task=train)]
    trainer = make_trainer(TrainOnly(["new_experts"]), extension, steps=1, limit_val_batches=0)
    if fits:
        trainer.fit(model, data)
        return
    with pytest.raises(UserError, match=f"task 'colour', got training data of the tasks .*{train}'.*: no sample"):
        trainer.fit(model, data)
    assert not hasattr(model.language, "model")


@pytest.mark.parametrize("probe", [{"rule": ExplicitLayers([1, 9])}, {"rule": AllLayers(), "new_experts": EXPERTS + 1}])
def test_a_probe_that_cannot_end_in_a_plan_is_refused_before_its_first_step(
    tiny_world: TinyWorld, make_trainer: Callable, probe: dict
) -> None:
    trainer = make_trainer(TrainOnly(["routers"]), ExpertExtension(**probe))
    with pytest.raises(UserError, match="Expected (layers among|at most)"):
        trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule("vqa"))
    assert trainer.global_step == 0


def test_a_probe_without_a_validation_set_is_refused_before_the_model_is_built(
    tiny_world: TinyWorld, make_trainer: Callable
) -> None:
    model = tiny_world.unbuilt()
    trainer = make_trainer(TrainOnly(["routers"]), ExpertExtension(rule=AllLayers()), steps=1)
    with pytest.raises(UserError, match="Expected a validation set.*got none. Set `val`"):
        trainer.fit(model, tiny_world.datamodule("vqa", val=None))
    assert not hasattr(model.language, "model")


def test_source_experts_may_be_those_used_before() -> None:
    counts = {"before": torch.tensor([9, 1, 0, 0]), "after": torch.tensor([0, 1, 9, 0])}
    usage = {moment: {"all": {0: value}} for moment, value in counts.items()}
    for source, expert in (("before", 0), ("after", 2)):
        plan = ExpertExtension(rule=AllLayers(), source=source).choose(usage["before"], usage["after"])
        assert plan.layers[0].sources == (expert,)


def test_a_language_model_alone_is_extended_by_a_plan_and_not_probed(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    make_plan([1], (3,), routing="open").save(tmp_path / "plan.yaml")
    data = tiny_world.datamodule("text", val=tiny_world.data("text", "test"))
    model = MoELanguageModel(base=str(tiny_world.base))
    extension = ExpertExtension(plan=str(tmp_path / "plan.yaml"))
    masked = ExpertExtension(plan=str(tmp_path / "plan.yaml"), routing="masked")
    with pytest.raises(UserError, match="`routing: open` for MoELanguageModel, which sees no pictures, got 'masked'"):
        make_trainer(TrainOnly(["new_experts"]), masked, steps=1).fit(model, data)
    make_trainer(TrainOnly(["new_experts"]), extension, steps=1).fit(model, data)
    assert model.num_experts == {0: 4, 1: 5, 2: 4}
    probe = make_trainer(TrainOnly(["routers"]), ExpertExtension(rule=AllLayers()), steps=1)
    with pytest.raises(UserError, match="got MoELanguageModel: a probe asks which experts pictures choose"):
        probe.fit(
            MoELanguageModel(base=str(tiny_world.base)),
            data,
        )
