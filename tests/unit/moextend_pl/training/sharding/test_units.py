"""What is sharded: whole layers, evenly, and nothing that is read outside of the model's pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from helpers.tiny_world import LAYERS, TinyWorld, make_plan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore

from moextend_pl.contracts import UserError
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.blocks import decoder_layers
from moextend_pl.moe.extension.extended_experts import ExtendedExperts
from moextend_pl.runs.sharded import local
from moextend_pl.training.sharding.units import language_of, shard

RANKS = 4


@pytest.fixture
def ranks() -> Iterator[int]:
    """Several ranks of which this process is the first; the others answer at once, with nothing."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield RANKS
    dist.destroy_process_group()


def grown(world: TinyWorld) -> MoExtend:
    return world.model(make_plan(sources=(1,)), ["projector", "new_experts", "new_routers", "calibration"])


def test_units_are_decoder_layers_and_the_model_around_them(tiny_world: TinyWorld, ranks: int) -> None:
    model = grown(tiny_world)
    language = model.language.model
    assert language_of(model) is language
    shard(language, init_device_mesh("cpu", (ranks,)))
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert units == [language, *decoder_layers(language)]
    assert len(units) == 1 + LAYERS
    assert not any(isinstance(module, ExtendedExperts) for module in units)


def test_each_rank_holds_an_even_part_of_a_layer_and_all_of_the_rest(tiny_world: TinyWorld, ranks: int) -> None:
    model = grown(tiny_world)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    shard(model.language.model, init_device_mesh("cpu", (ranks,)))
    for name, parameter in model.named_parameters():
        inside = name.startswith("language.model.") and "embed_tokens" not in name
        assert isinstance(parameter, DTensor) == inside, name
        assert local(parameter).numel() * (ranks if inside else 1) == parameter.numel(), name
        assert parameter.requires_grad == (name in learns), name
    new = [p for p in model.parts()["new_experts"] if p.dim() == 3]
    assert new
    assert all(len(p) == 1 and local(p).shape[1] < p.shape[1] for p in new)  # a single one is cut all the same


def test_copies_are_laid_out_by_the_first_dimension_of_the_mesh(tiny_world: TinyWorld, ranks: int) -> None:
    model = grown(tiny_world)
    shard(model.language.model, init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copy", "part")))
    for parameter in model.parts()["new_experts"]:
        assert isinstance(parameter, DTensor)
        assert isinstance(parameter.placements[0], Replicate)
        assert local(parameter).numel() * ranks // 2 == parameter.numel()


def test_what_has_a_type_of_its_own_in_a_model_of_16_bits_stays_whole(tiny_world: TinyWorld, ranks: int) -> None:
    model = grown(tiny_world).to(torch.bfloat16)
    gate = decoder_layers(model.language.model)[1].mlp.gate
    gate.weight.data = gate.weight.data.float()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        shard(model.language.model, init_device_mesh("cpu", (ranks,)))
    finally:
        torch.set_default_dtype(before)
    assert not isinstance(gate.weight, DTensor)


def test_model_without_known_layers_is_refused(tiny_world: TinyWorld) -> None:
    language = tiny_world.stock()
    language.model.layers = torch.nn.ModuleList()
    with pytest.raises(UserError, match="its weights cannot be sharded"):
        shard(language, None)  # type: ignore[arg-type]
