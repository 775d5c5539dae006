"""The baseline of low rank: adapters alone learn beside the projector, and begin as nothing."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_world import TinyWorld

from moextend_pl.contracts import TrainPlan, UserError
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.quickstart import low_rank
from moextend_pl.quickstart.low_rank import LowRankBaseline


def parts(world: TinyWorld, dense: bool = True) -> dict:
    base = world.dense if dense else world.base
    return {
        "encoder": VisionEncoder(path=str(world.encoder)),
        "projector": Projector(kind="linear"),
        "language": MoELanguageModel(base=str(base), dense=dense),
    }


def test_adapters_alone_learn_and_change_nothing_before_they_do(tiny_world: TinyWorld) -> None:
    plain, adapted = MoExtend(**parts(tiny_world)), LowRankBaseline(rank=3, **parts(tiny_world))
    adapted.train_plan = TrainPlan(("projector", "adapters"))
    for model in (plain, adapted):
        model.configure_model()
        model.eval()
    batch = {"input_ids": torch.arange(8).reshape(1, 8), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    assert torch.equal(adapted.language(batch), plain.language(batch))
    learned = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name for name in learned if "lora_" not in name} == {
        name for name, _ in adapted.named_parameters() if name.startswith("projector.")
    }
    layers = adapted.language.model.config.num_hidden_layers
    assert sum("lora_A" in name for name in learned) == sum("lora_B" in name for name in learned) == 7 * layers


def test_what_it_cannot_do_is_told_of(tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="Expected a dense language model"):
        LowRankBaseline(**parts(tiny_world, dense=False))
    monkeypatch.setattr(low_rank, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs peft"):
        LowRankBaseline(**parts(tiny_world))
