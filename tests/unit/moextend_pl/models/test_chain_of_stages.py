"""What stages hand to one another through `init_from`, and what `load` builds again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import TinyWorld, make_plan, perturb
from safetensors.torch import load_file
from torch import Tensor

from moextend_pl.contracts import TrainPlan, UserError
from moextend_pl.models.delta import save_delta
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector

NEW = ("new_experts", "new_routers", "calibration")


def stage(
    world: TinyWorld, run: Path, parts: tuple[str, ...], learned: tuple[str, ...] = (), **options: object
) -> Path:
    """Builds a stage, moves what it learns, and writes its delta."""
    plan = options.pop("plan", None)
    model = world.unbuilt(**options)
    model.extension_plan, model.train_plan = plan, TrainPlan(parts)
    model.configure_model()
    perturb([p for name in learned or parts for p in model.parts()[name]], size=0.05)
    save_delta(model, run)
    return run


@torch.no_grad()
def logits(model: MoExtend, world: TinyWorld) -> Tensor:
    batch = world.batch(model, "itit")
    return model.language(batch, model.embed(batch))


def routers(model: MoExtend) -> list[Tensor]:
    return [p.detach() for p in model.parts()["routers"]]


@pytest.mark.parametrize("plan", [None, make_plan(init="copy", routing="masked")], ids=["frozen", "extended"])
def test_what_an_earlier_stage_learned_stays_though_later_ones_freeze_it(
    tiny_world: TinyWorld, tmp_path: Path, plan: object
) -> None:
    first = stage(tiny_world, tmp_path / "1", ("projector", "routers"))
    parts = ("projector",) if plan is None else NEW
    second = stage(tiny_world, tmp_path / "2", parts, init_from=first, plan=plan)
    expected = routers(MoExtend.load(first))
    untouched = routers(tiny_world.model(parts=()))
    for model in (MoExtend.load(second), tiny_world.model(parts=(), init_from=second)):
        for got, learned, fresh in zip(routers(model), expected, untouched, strict=True):
            assert torch.equal(got, learned)
            assert not torch.equal(got, fresh)


def test_statistics_of_a_learning_tower_are_part_of_what_it_learned(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = tiny_world.model(parts=["encoder", "projector"])
    model.train()
    before = {name: buffer.clone() for name, buffer in model.encoder.named_buffers()}
    model(tiny_world.batch(model, "iiii")).loss.backward()
    moved = [n for n, b in model.encoder.named_buffers() if "running_mean" in n and not torch.equal(b, before[n])]
    assert moved
    save_delta(model, tmp_path)
    assert torch.equal(logits(MoExtend.load(tmp_path), tiny_world), logits(model.eval(), tiny_world))


def test_another_base_under_an_earlier_stage_is_refused(tiny_world: TinyWorld, tmp_path: Path) -> None:
    first = stage(tiny_world, tmp_path / "1", ("projector",))
    base = tmp_path / "base"
    shutil.copytree(tiny_world.base, base)
    other = MoELanguageModel(base=str(base))
    other.configure_model()
    perturb(list(other.parameters()), size=0.1)
    other.save_pretrained(base)
    model = MoExtend(
        encoder=VisionEncoder(path=str(tiny_world.encoder)),
        projector=Projector(kind="mlp2x_gelu"),
        language=MoELanguageModel(base=str(base)),
        init_from=str(first),
    )
    with pytest.raises(UserError, match="the base has changed since this run was trained: language"):
        model.configure_model()


def test_a_base_in_4_bits_may_follow_one_that_was_not_and_is_told(
    tiny_world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = stage(tiny_world, tmp_path / "1", ("projector",))
    tiny_world.model(parts=(), init_from=first, quantize="nf4")
    assert "its base was of another type" in caplog.text


def test_tokenizer_of_its_own_and_template_file_are_found_again(tiny_world: TinyWorld, tmp_path: Path) -> None:
    words = tmp_path / "words"
    tiny_world.model(parts=()).language.tokenizer.save_pretrained(words)
    (tmp_path / "template.jinja").write_text("{{ messages[0]['content'] }}")
    options = {"tokenizer": str(words), "chat_template": str(tmp_path / "template.jinja")}
    run = stage(tiny_world, tmp_path / "run", ("projector",), **options)
    for place in (run, shutil.copytree(run, tmp_path / "copy")):
        language = MoExtend.load(place).language
        assert Path(language.tokenizer_path) == words
        assert Path(str(language.chat_template)) == tmp_path / "template.jinja"


def test_a_template_by_name_is_no_place_even_beside_a_folder_of_that_name(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inst").mkdir()
    monkeypatch.chdir(tmp_path)
    run = stage(tiny_world, tmp_path / "run", ("projector",), chat_template="inst")
    assert MoExtend.load(run).language.chat_template == "inst"


def test_the_same_growth_with_another_option_is_told_to_be_a_second_extension(
    tiny_world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = stage(tiny_world, tmp_path / "1", NEW, plan=make_plan(routing="masked"))
    model = tiny_world.model(make_plan(routing="open"), NEW, init_from=first)
    assert len(model.plans) == 2
    assert "grows the same layers from the same sources once more" in caplog.text


def test_features_of_another_type_are_forgotten(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(parts=())
    logits(model, tiny_world)
    assert model.features.features
    model.to(torch.float64)
    batch = tiny_world.batch(model, "i")
    assert model.encode(batch["pixel_values"].double(), batch["image_keys"]).dtype == torch.float64


def test_delta_holds_no_tensor_that_the_base_has_as_it_is(tiny_world: TinyWorld, tmp_path: Path) -> None:
    first = stage(tiny_world, tmp_path / "1", ("projector",))
    names = set(load_file(stage(tiny_world, tmp_path / "2", ("projector",), init_from=first) / "delta.safetensors"))
    assert names == {f"projector.{name}" for name, _ in tiny_world.model(parts=()).projector.named_parameters()}
