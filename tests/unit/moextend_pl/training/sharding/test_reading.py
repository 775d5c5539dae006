"""A process reads of a base the part that it is to hold, with the values of a whole reading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.tiny_families import COMMON, LATENT_ATTENTION
from helpers.tiny_world import TinyWorld, make_plan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moextend_pl.contracts import UserError
from moextend_pl.models.base_model import load_base
from moextend_pl.moe.extension.growth import new_parameters
from moextend_pl.moe.parallel.cut import of_whole, own_slice, part_of, take_values
from moextend_pl.runs.fingerprints import tensor_sha256
from moextend_pl.training.sharding.reading import Share

RANKS, SOURCES = 2, {1: {0, 3}, 2: {1}}
ShareOf = Callable[..., Share]


@pytest.fixture
def as_rank() -> Iterator[ShareOf]:
    """Makes this process one of several, of which the others answer with nothing; returns its share."""

    def become(rank: int, experts: bool) -> Share:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
        return Share(init_device_mesh("cpu", (RANKS,)), experts, SOURCES, hashed=True)

    yield become
    dist.destroy_process_group()


def save_model(family: str, folder: Path) -> None:
    """Writes a random model in the layout of its family's published files."""
    default = CONFIG_MAPPING[family]()
    options = {**COMMON, **(LATENT_ATTENTION if family == "deepseek_v3" else {})}
    known = {name: value for name, value in options.items() if hasattr(default, name)}
    config = CONFIG_MAPPING[family](**known, tie_word_embeddings=family == "mixtral")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def assert_part(held: DTensor, whole: torch.Tensor) -> None:
    assert held.shape == whole.shape
    dimension = held.placements[0].dim
    assert torch.equal(held.to_local(), own_slice(whole, held.device_mesh, dimension))
    known = of_whole(held)
    assert known is not None
    assert known.sha256 == tensor_sha256(whole)
    assert all(torch.equal(copied, whole[row]) for row, copied in known.rows.items())


# Experts one by one in the files, merged while they are read; a layer without experts; tied embeddings.
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("experts", [True, False], ids=["experts", "layers"])
def test_every_weight_is_that_of_a_whole_reading(tmp_path: Path, as_rank: ShareOf, family: str, experts: bool) -> None:
    save_model(family, tmp_path)
    expected = load_base(str(tmp_path))
    for rank in range(RANKS):
        model = load_base(str(tmp_path), share=as_rank(rank, experts))
        assert set(vars(model)) == set(vars(expected))
        assert model.config.to_dict() == expected.config.to_dict()
        values = model.state_dict(keep_vars=True)
        assert list(values) == list(expected.state_dict())
        for name, whole in expected.state_dict(keep_vars=True).items():
            held = values[name]
            assert held.dtype == whole.dtype
            assert held.requires_grad == whole.requires_grad
            if isinstance(held, DTensor):
                assert_part(held, whole)
            else:
                assert torch.equal(held, whole), name
        stacks = {name for name, value in values.items() if ".experts." in name and isinstance(value, DTensor)}
        assert len(stacks) >= 6
        others = {name for name, value in values.items() if isinstance(value, DTensor)} - stacks
        assert bool(others) != experts


def test_extension_of_parts_is_that_of_the_whole(tiny_world: TinyWorld, as_rank: ShareOf) -> None:
    plan = make_plan(layers=(1, 2), sources=(1,))
    whole, parts = tiny_world.unbuilt().language, tiny_world.unbuilt().language
    whole.build_base()
    share = as_rank(1, True)
    parts.build_base(Share(share.mesh, True, {1: {1}, 2: {1}}))
    new = []
    for language in (whole, parts):
        language.extend(plan)
        new.append(new_parameters(language.model))
    assert new[0].keys() == new[1].keys()
    for part, values in new[0].items():
        assert all(torch.equal(a, b) for a, b in zip(values, new[1][part], strict=True)), part


def test_what_an_earlier_stage_learned_is_taken_in_part(as_rank: ShareOf) -> None:
    share = as_rank(1, True)
    stack, learned = torch.zeros(4, 3), torch.arange(12.0).reshape(4, 3)
    part = part_of(stack, share.mesh, 0)
    part.of_whole = type("Known", (), {"rows": {0: torch.zeros(3)}})()  # type: ignore[attr-defined]
    take_values(part, learned)
    assert torch.equal(part.to_local(), learned[2:])  # type: ignore[operator]
    assert torch.equal(of_whole(part).rows[0], learned[0])  # type: ignore[union-attr]
    take_values(stack, learned)
    assert torch.equal(stack, learned)


def test_weights_that_do_not_fit_are_told_as_without_sharing(
    tiny_world: TinyWorld, tmp_path: Path, as_rank: ShareOf
) -> None:
    shutil.copytree(tiny_world.base, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 16}))
    with pytest.raises(UserError, match="do not fit its config.json"):
        load_base(str(tmp_path / "base"), share=as_rank(0, True))
