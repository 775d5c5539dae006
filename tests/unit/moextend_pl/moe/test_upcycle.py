"""Upcycled MLPs against the dense ones they were, and against the equations one image and one expert at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from moextend_pl.contracts import ExtensionPlan, LayerGrowth, UpcycleSpec, UserError
from moextend_pl.models.tower import BlockReader
from moextend_pl.moe.blocks import find_blocks
from moextend_pl.moe.dense_mlp import find_mlps, read_mlp
from moextend_pl.moe.extension.growth import grow
from moextend_pl.moe.extension.reach import Reach
from moextend_pl.moe.upcycle import UpcycledMLP, upcycle, upcycled_mlps

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 30, "head_dim": 8, "initializer_range": 0.3}
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(0))
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
    "timm vit": lambda: timm.create_model("test_vit", img_size=32, features_only=True, out_indices=(-2,)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TEXT)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT)),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[name]().eval()


def output(model: nn.Module) -> Tensor:
    if hasattr(model, "lm_head"):
        return model(IDS).logits
    result = model(PIXELS)
    return result[-1] if isinstance(result, list) else result.last_hidden_state


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("spec", [UpcycleSpec(4, 2), UpcycleSpec(3, 3), UpcycleSpec(8, 1, layers=(1,))], ids=str)
@torch.no_grad()
def test_upcycled_model_is_the_dense_one_for_any_router(name: str, spec: UpcycleSpec) -> None:
    model = make(name)
    expected = output(model)
    upcycle(model, spec)
    mlps = [mlp for _, mlp in upcycled_mlps(model)]
    assert len(mlps) == (1 if spec.layers else len(find_mlps(make(name))))
    for mlp in mlps:
        mlp.gate.weight.copy_(torch.randn(mlp.gate.weight.shape) * 3)
    assert (output(model) - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))
    assert isinstance(mlps[0].experts.down_proj, nn.Parameter)
    assert mlps[0].experts.down_proj.dim() == 3


def looped(mlp: UpcycledMLP, x_BND: Tensor, top_k: int) -> Tensor:
    """Image by image and expert by expert, as the published code computes (methods of CuMo, section 3.2)."""
    experts = mlp.experts
    results = []
    for x_ND in x_BND:
        probs = torch.softmax(x_ND @ mlp.gate.weight.T, dim=-1)
        values, chosen = probs.topk(top_k)
        weights = values / values.sum(-1, keepdim=True)
        y = x_ND.new_zeros(len(x_ND), experts.down_proj.shape[1])
        for e in range(len(mlp.gate.weight)):
            rows, slots = (chosen == e).nonzero(as_tuple=True)
            if experts.has_gate:
                gate, up = (x_ND[rows] @ experts.gate_up_proj[e].T + experts.gate_up_proj_bias[e]).chunk(2, -1)
                hidden = experts.act_fn(gate) * up
            else:
                hidden = experts.act_fn(x_ND[rows] @ experts.up_proj[e].T + experts.up_proj_bias[e])
            y[rows] += weights[rows, slots, None] * (hidden @ experts.down_proj[e].T + experts.down_proj_bias[e])
        results.append(y)
    return torch.stack(results)


class Gated(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down_proj, self.act_fn = nn.Linear(hidden, width), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def trained(dense: nn.Module, spec: UpcycleSpec) -> UpcycledMLP:
    mlp = UpcycledMLP(read_mlp(dense), spec)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return mlp


@pytest.mark.parametrize("widths", [(16, 24), (7, 9)], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_grouped_experts_equal_the_loop_with_gradients(gated: bool, widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    width, hidden = widths
    dense = (
        Gated(width, hidden) if gated else nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    )
    mlp = trained(dense, UpcycleSpec(5, 2))
    with torch.no_grad():
        mlp.gate.weight[3] = -100 * mlp.gate.weight.abs().sum()  # an expert without tokens
    x = torch.rand(3, 6, width, requires_grad=True)
    got, expected = mlp(x), looped(mlp, x, 2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    tensors = [x, *mlp.parameters()]
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad((got * direction).sum(), tensors)
    for a, b in zip(grads, torch.autograd.grad((expected * direction).sum(), tensors), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not grads[-1][3].any(), "the expert without tokens has a gradient, and it is zero"


def test_first_step_gives_every_router_and_expert_a_gradient() -> None:
    model = make("clip")
    upcycle(model, UpcycleSpec())
    output(model).square().sum().backward()
    for _, mlp in upcycled_mlps(model):
        assert mlp.experts.up_proj.grad.flatten(1).any(dim=1).sum() >= 2
        # All experts are equal at first, so that only the losses of the router move it.
        assert mlp.gate.weight.grad.abs().max() < 1e-3


def test_experts_from_scratch_are_not_the_mlp_and_differ() -> None:
    model = make("clip")
    expected = output(model)
    upcycle(model, UpcycleSpec(from_scratch=True))
    experts = upcycled_mlps(model)[0][1].experts
    assert not torch.equal(experts.up_proj[0], experts.up_proj[1])
    assert experts.up_proj.abs().max() <= 16**-0.5
    assert not torch.allclose(output(model), expected, atol=1e-2)


def test_upcycling_twice_changes_nothing_and_the_same_seed_gives_the_same_routers() -> None:
    first, second = make("clip"), make("clip")
    upcycle(first, UpcycleSpec())
    torch.rand(5)
    upcycle(second, UpcycleSpec())
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
    before = list(map(id, first.parameters()))
    upcycle(first, UpcycleSpec(8, 2))
    assert list(map(id, first.parameters())) == before
    gates = [mlp.gate.weight for _, mlp in upcycled_mlps(first)]
    assert not torch.equal(gates[0], gates[1]), "layers have routers of their own"


class Scaled(nn.Module):
    """An MLP that does something its children do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.fc2(self.act(self.fc1(x)))


def test_mlp_that_does_more_than_its_structure_says_is_refused() -> None:
    with pytest.raises(UserError, match="does more than its linear maps"):
        upcycle(nn.ModuleList([Scaled()]), UpcycleSpec())


def test_models_without_mlps_and_layers_that_do_not_exist_are_refused() -> None:
    convolutions = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(UserError, match="found none in ResNetModel"):
        upcycle(convolutions, UpcycleSpec())
    with pytest.raises(UserError, match=r"`layers` of `upcycle` in 0..2, got \[3\]"):
        upcycle(make("clip"), UpcycleSpec(layers=(3,)))
    with pytest.raises(UserError, match=r"`layers` of `upcycle` in 0..2, got \[\]"):
        upcycle(make("clip"), UpcycleSpec(layers=()))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_k": 5}, "in 1..4"), ({"counting": "mean"}, "got 'mean'"), ({"z": -1.0}, ">= 0")],
)
def test_impossible_specs_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        UpcycleSpec(**options)


@torch.no_grad()
def test_upcycled_language_model_is_a_mixture_of_experts_that_can_be_extended() -> None:
    model = make("mistral")
    upcycle(model, UpcycleSpec())
    blocks = find_blocks(model)
    assert [(block.layer, block.num_experts) for block in blocks] == [(0, 4), (1, 4), (2, 4)]
    for block in blocks:
        for parameter in block.experts.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    stock, reach = copy.deepcopy(model), Reach()
    growth = (LayerGrowth(1, (2, 0)),)
    grow(model, ExtensionPlan(layers=growth, init="preserving", routing="masked"), reach)
    new = find_blocks(model)[1].experts.new
    assert torch.equal(new.gate_up_proj[0], blocks[1].experts.base.gate_up_proj[2])
    reach.set(torch.zeros(2, dtype=torch.bool))
    assert torch.equal(model(IDS).logits, stock(IDS).logits)
    reach.set(torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, atol=1e-5, rtol=1e-5)
    new.down_proj.add_(1.0)
    assert not torch.allclose(model(IDS).logits, stock(IDS).logits, atol=1e-2)


def test_full_size_parameter_counts() -> None:
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        tower = CLIPVisionModel(config)
        projector = nn.Sequential(nn.Linear(2048, 4096), nn.GELU(), nn.Linear(4096, 4096))

    def count(model: nn.Module) -> int:
        # CuMo's files leave the last norm out.
        return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("post_layernorm"))

    assert count(tower) == 303_505_408
    upcycle(tower, UpcycleSpec())
    assert count(tower) == 907_952_128
    # 1 + 1 + 1 embeddings, 2 of the first norm; 13 router and attention and norm, 8 of the experts, for each block
    assert len(list(tower.named_parameters())) == 2 + 5 + 24 * (12 + 1 + 4)
    assert count(UpcycledMLP(read_mlp(projector), UpcycleSpec())) == 100_704_256


def test_reader_of_a_block_takes_off_what_stands_behind_it() -> None:
    model = make("clip")
    expected = model(PIXELS, output_hidden_states=True).hidden_states[-2]
    reader = BlockReader(model, -2, keep_unread=False)
    torch.testing.assert_close(reader(PIXELS), expected)
    assert reader.dropped == ("encoder.layers.2.",)
    assert {name for name, _ in model.named_parameters() if name.startswith("post")} == reader.optional_names()
    with pytest.raises(UserError, match=r"1\.\.2 or -2\.\.-1, got 3"):
        BlockReader(model, 3, keep_unread=False)


@torch.no_grad()
def test_bf16_autocast_computes_experts_in_bf16(fixtures: Path) -> None:
    golden = load_file(fixtures / "cumo_mlp_moe.safetensors")
    dense = nn.Sequential(nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 24))
    mlp = trained(dense, UpcycleSpec())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mlp(golden["x"].bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), mlp(golden["x"]), atol=5e-2, rtol=5e-2)


def test_upcycled_mlp_computes_shapes_on_the_meta_device() -> None:
    with torch.device("meta"):
        mlp = read_mlp(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)))
        assert mlp is not None
        assert UpcycledMLP(mlp, UpcycleSpec())(torch.empty(2, 5, 16)).shape == (2, 5, 16)
