"""Terms of distillation, and their gradients, against tensors made by LLAVADI's functions and LLaVA-KD's equations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moextend_pl.contracts import IGNORE_INDEX
from moextend_pl.distillation.losses import DistillTerm, LogitTerm
from moextend_pl.distillation.relations import AffinityTerm, RelationTerm
from moextend_pl.distillation.scopes import Scope, find_places, find_scopes
from moextend_pl.distillation.signals import Signals
from moextend_pl.samples.host_facts import with_host_facts

FIXTURES = Path(os.environ.get("MOEXTEND_FIXTURES", Path(__file__).parents[1] / "fixtures"))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KINDS = {"fkl": "forward", "rkl": "reverse", "jsd": "jsd", "mse": "mse"}
# Name in the file -> the term that is to give it. The release reads logits where the answer stands: not shifted.
TERMS: dict[str, DistillTerm] = {
    **{f"llavadi.{short}.shifted": LogitTerm(divergence=kind, mean="samples") for short, kind in KINDS.items()},
    **{
        f"llavadi.{short}.released": LogitTerm(scope="answer_own", divergence=kind, mean="samples")
        for short, kind in KINDS.items()
    },
    "llavadi.fkl.normalised.released": LogitTerm(scope="answer_own", standardise=True, mean="samples"),
    "llavadi.affinity": AffinityTerm(),
    "llava_kd.response": LogitTerm(),
    "llava_kd.visual": LogitTerm(scope="image"),
    "llava_kd.relation": RelationTerm(),
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(FIXTURES / "distillation_terms.safetensors")


def scopes_of(golden: dict[str, Tensor]) -> tuple[Tensor, dict[str, Scope]]:
    """Returns the positions whose logits are asked for, and the scopes."""
    labels, image_id = golden["labels"], 99
    batch: Any = {
        "keys": [str(n) for n in range(len(labels))],
        "input_ids": torch.zeros_like(labels).masked_fill(golden["image_mask"], image_id),
        "attention_mask": torch.ones_like(labels),
        "labels": labels,
    }
    masks = find_scopes(batch, image_id, with_pictures=True)
    known = with_host_facts(batch, image_id)["known"]
    places = find_places(batch, known, masks, logits={"answer", "answer_own", "image"})
    assert (places.asked.targets != IGNORE_INDEX).sum() == (labels != IGNORE_INDEX).sum()
    return places.asked.learned, places.scopes


def test_every_term_of_the_file_is_one_of_ours(golden: dict[str, Tensor]) -> None:
    assert {name for name in golden if name.startswith("llava") and not name.endswith(".grad0")} == set(TERMS)


@pytest.mark.parametrize("name", TERMS)
def test_term_and_its_gradient_are_the_published_ones(golden: dict[str, Tensor], name: str) -> None:
    asked, scopes = scopes_of(golden)
    inputs = {key: golden[key].flatten(0, 1).clone() for key in golden if key.startswith(("student_", "teacher_"))}
    for key in ("student_logits", "student_hidden"):
        inputs[key].requires_grad_()
    student, teacher = (
        Signals(inputs[f"{who}_logits"].index_select(0, asked), inputs[f"{who}_hidden"])
        for who in ("student", "teacher")
    )
    value = TERMS[name].compare(student, teacher, scopes, None)
    torch.testing.assert_close(value, golden[name].squeeze(), **CLOSE)
    value.backward()
    wanted = inputs["student_hidden" if name == "llavadi.affinity" else "student_logits"].grad
    torch.testing.assert_close(wanted, golden[f"{name}.grad0"].flatten(0, 1), **CLOSE)
