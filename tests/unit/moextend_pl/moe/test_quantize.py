"""A base in 4 bits: what is packed, that nothing else changes, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import make_plan, perturb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moextend_pl.contracts import UserError
from moextend_pl.models import base_model
from moextend_pl.models.base_model import check_base, load_base
from moextend_pl.moe import dispatch, quantize
from moextend_pl.moe.blocks import find_blocks
from moextend_pl.moe.extension.growth import grow, new_parameters, strip
from moextend_pl.moe.extension.reach import Reach
from moextend_pl.moe.nf4 import NF4Weight
from moextend_pl.runs.fingerprints import fingerprints

IMPLEMENTATIONS = ("moextend", "grouped_mm", "eager", "batched_mm")
EXPERTS = 4
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 50,
    "num_local_experts": EXPERTS, "num_experts": EXPERTS, "num_experts_per_tok": 2, "initializer_range": 0.2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HYBRID = {
    "n_routed_experts": EXPERTS, "layer_types": ["linear_attention", "moe", "full_attention", "moe"],
    "num_hidden_layers": 4, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
    "moe_latent_size": None,
}  # fmt: skip
# gated; shared; transposed with biases; fine-grained; with a shared expert behind a gate
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "qwen2_moe")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")


def build(family: str, **changes: object) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **changes}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the base of a family, once."""
    root = tmp_path_factory.mktemp("families")

    def write(family: str) -> Path:
        if not (root / family).exists():
            build(family).save_pretrained(root / family)
        return root / family

    return write


def load(path: Path) -> PreTrainedModel:
    return load_base(str(path), "nf4").eval().requires_grad_(False)


def packed_weights(model: nn.Module) -> dict[str, NF4Weight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Weight)}


def unpacked_twin(path: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The stock model with the numbers of the packed one."""
    twin = load_base(str(path)).eval().requires_grad_(False)
    for name, weight in packed_weights(model).items():
        with torch.no_grad():
            twin.get_parameter(name).copy_(weight.operand.unpacked(torch.float32))
    return twin


def ids(rows: int = 2, columns: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 50, (rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_linear_layers_are_packed_and_nothing_else_changes(
    folder: Callable[[str], Path], family: str
) -> None:
    path = folder(family)
    model, stock = load(path), load_base(str(path))
    leaves = {re.sub(r".*?layers\.\d+\.", "", name) for name in packed_weights(model)}
    expected = {f"self_attn.{name}.weight" for name in LINEAR} | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    if family == "qwen2_moe":
        expected |= {f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert leaves == expected
    assert len(packed_weights(model)) == 2 * len(expected)
    rest = {name: p for name, p in model.named_parameters() if not name.endswith((".packed", ".absmax"))}
    assert set(rest) == {n for n, _ in stock.named_parameters()} - set(packed_weights(model))
    assert all(torch.equal(p, stock.get_parameter(name)) for name, p in rest.items())
    assert all(b.num_experts == EXPERTS for b in find_blocks(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_bytes_are_less_than_0_30_of_sixteen_bits(folder: Callable[[str], Path], family: str) -> None:
    weights = packed_weights(load(folder(family))).values()
    held = sum(p.numel() * p.element_size() for weight in weights for p in weight.parameters())
    assert held <= 0.30 * sum(weight.shape.numel() for weight in weights) * 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_those_of_the_unpacked_model(
    folder: Callable[[str], Path], family: str, implementation: str
) -> None:
    model = load(folder(family))
    results = []
    for each in (unpacked_twin(folder(family), model), model):
        dispatch.use(each, implementation)
        x = each.get_input_embeddings()(ids()).requires_grad_()
        logits = each(inputs_embeds=x).logits
        logits.square().mean().backward()
        results.append((logits.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    assert results[0][1].abs().max() > 1e-3


def kept_for_backward(model: PreTrainedModel) -> list[Tensor]:
    """The numbers that a forward pass keeps, its own parameters and repetitions not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and pointer not in parameters:
            kept[pointer] = tensor
        return tensor

    x = model.get_input_embeddings()(ids()).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(inputs_embeds=x).logits
    assert output.requires_grad
    return list(kept.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_backward_keeps_no_unpacked_weight(folder: Callable[[str], Path], family: str, implementation: str) -> None:
    model = load(folder(family))
    twin = unpacked_twin(folder(family), model)
    sizes = []
    for each in (twin, model):
        dispatch.use(each, implementation)
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept_for_backward(each)))
    # `batched_mm` of the stock model keeps a copy of the chosen experts for every token; the packed model does not.
    if implementation == "batched_mm":
        assert sizes[1] < sizes[0] / 2
    else:
        assert sizes[1] == sizes[0]


# The eager loop of some families, and of all in older releases, knows no index to be skipped, packed or not.
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_tokens_of_other_experts_are_skipped(folder: Callable[[str], Path], family: str, implementation: str) -> None:
    model = load(folder(family))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 64, generator=generator)
    indices = torch.rand(12, EXPERTS + 1, generator=generator).topk(2).indices  # EXPERTS is the index to be skipped
    weights = torch.rand(12, 2, generator=generator).masked_fill(indices == EXPERTS, 0.0)
    assert (indices == EXPERTS).any()
    results = []
    for each in (unpacked_twin(folder(family), model), model):
        dispatch.use(each, implementation)
        experts = find_blocks(each)[0].experts
        experts._is_expert_parallel = True
        x = values.clone().requires_grad_()
        y = experts(x, indices, weights)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), x.grad))
    assert all(t.isfinite().all() for t in results[1])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_take_no_tokens_at_all(folder: Callable[[str], Path], implementation: str) -> None:
    model = load(folder("mixtral"))
    dispatch.use(model, implementation)
    x = torch.zeros(0, 64, requires_grad=True)
    y = find_blocks(model)[0].experts(x, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert y.shape == (0, 64)
    if y.requires_grad:  # `eager` loops over no expert then
        y.backward(torch.zeros_like(y))
        assert x.grad.shape == (0, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_in_sixteen_bits_computes_as_its_unpacked_twin(folder: Callable[[str], Path], family: str) -> None:
    model = load(folder(family))
    twin = unpacked_twin(folder(family), model)
    with torch.no_grad():
        expected, got = (each.to(torch.bfloat16)(ids()).logits for each in (twin, model))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def train(model: PreTrainedModel, parameters: list[nn.Parameter], steps: int = 12) -> list[float]:
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.02), []
    for _ in range(steps):
        loss = model(input_ids=ids(4, 12, seed=5), labels=ids(4, 12, seed=5)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("init", ["copy", "preserving"])
@pytest.mark.parametrize("family", FAMILIES)
def test_extension_on_top_learns_and_leaves_the_base_as_it_was(
    folder: Callable[[str], Path], family: str, init: str
) -> None:
    model, reach = load(folder(family)), Reach()
    before = fingerprints(dict(model.named_parameters()))
    with torch.no_grad():
        expected = model(ids()).logits
    grow(model, make_plan([0, 1], (1,), init=init), reach)
    assert all(block.num_experts == EXPERTS + 1 for block in find_blocks(model))
    parts = new_parameters(model)
    assert {p.dtype for p in parts["new_experts"]} == {torch.float32}
    reach.set(torch.ones(4, dtype=torch.bool))
    losses = train(model, [p for parameters in parts.values() for p in parameters])
    assert losses[-1] < losses[0] - 0.1
    reach.set(None)
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, expected)
    strip(model)
    assert fingerprints(dict(model.named_parameters())) == before
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, expected)


def test_new_expert_starts_as_the_unpacked_copy_of_its_source(folder: Callable[[str], Path]) -> None:
    model = load(folder("gpt_oss"))
    twin = unpacked_twin(folder("gpt_oss"), model)
    grow(model, make_plan([1], (3,)), Reach())
    new, source = find_blocks(model)[1].experts.new, find_blocks(twin)[1].experts
    assert {name for name, _ in new.named_parameters()} == {name for name, _ in source.named_parameters()}
    assert all(torch.equal(p, source.get_parameter(name)[3:4]) for name, p in new.named_parameters())


def test_cached_generation_of_a_grown_model_runs_on_packed_weights(folder: Callable[[str], Path]) -> None:
    model, reach = load(folder("mixtral")), Reach()
    grow(model, make_plan([0], (1,), init="copy"), reach)
    perturb([p for parameters in new_parameters(model).values() for p in parameters])
    reach.set(torch.ones(2, dtype=torch.bool))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(ids(), attention_mask=torch.ones_like(ids()), **options)
    assert torch.equal(model.generate(ids(), use_cache=False, attention_mask=torch.ones_like(ids()), **options), cached)


@pytest.mark.slow
def test_compiled_model_computes_as_it_does_uncompiled(folder: Callable[[str], Path]) -> None:
    model, results = load(folder("mixtral")), []
    for run in (model, torch.compile(model, backend="aot_eager")):
        x = model.get_input_embeddings()(ids()).requires_grad_()
        logits = run(inputs_embeds=x).logits
        logits.square().mean().backward()
        results.append((logits.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


def rewrite(source: Path, target: Path, layout: str) -> Path:
    """Writes a Mixtral base in another layout of files."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(target, max_shard_size="50KB" if layout == "many files" else "5GB")
    if layout == "merged experts":
        save_file(dict(model.state_dict()), target / "model.safetensors", metadata={"format": "pt"})
    return target


LAYOUTS = {"one file": 1, "many files": 5, "merged experts": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_files_gives_the_same_packed_weights(
    folder: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    path = rewrite(folder("mixtral"), tmp_path / "other", layout)
    files = list(path.glob("*.safetensors"))
    assert len(files) >= LAYOUTS[layout]
    names = {name for file in files for name in load_file(file)}
    assert any(name.endswith("experts.0.w1.weight") for name in names) == (layout != "merged experts")
    got, expected = (fingerprints(dict(load(p).named_parameters())) for p in (path, folder("mixtral")))
    assert got == expected


def test_sixteen_bit_files_are_packed_as_the_same_numbers_in_32_bits(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder("mixtral"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "16")
    model.float().save_pretrained(tmp_path / "32")
    got, expected = (fingerprints(dict(load(tmp_path / name).named_parameters())) for name in ("16", "32"))
    assert got == expected


def test_tied_head_is_not_packed(tmp_path: Path) -> None:
    build("olmoe", tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert isinstance(model.lm_head.weight, nn.Parameter)


def test_experts_without_a_gate_are_packed(tmp_path: Path) -> None:
    build("nemotron_h", **HYBRID).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert {name.rpartition(".")[2] for name in packed_weights(model) if ".experts." in name} == {
        "up_proj",
        "down_proj",
    }
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, unpacked_twin(tmp_path, model)(ids()).logits)


def test_base_that_lacks_the_weights_of_an_expert_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = rewrite(folder("mixtral"), tmp_path / "other", "merged experts")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 weights of its .*model\.layers\.1\.mlp\.experts\.down_proj"):
        load(path)


def test_experts_that_were_passed_over_are_an_error(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As transformers' own 4-bit loading does, which packs Linear layers only.
    monkeypatch.setattr(
        quantize.NF4Quantizer, "param_needs_quantization", lambda *args, **_: not args[2].endswith("_up_proj")
    )
    with pytest.raises(UserError, match=r"2 of 12 weights are not in 4 bits.*gate_up_proj"):
        load(folder("mixtral"))


def test_experts_that_do_not_divide_into_blocks_are_refused(tmp_path: Path) -> None:
    build("mixtral", hidden_size=48, intermediate_size=18, head_dim=16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"multiple of 64 weights .*down_proj of shape \(4, 48, 18\)"):
        load(tmp_path)


def test_base_that_is_quantised_already_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = rewrite(folder("mixtral"), tmp_path / "other", "one file")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(UserError, match="is quantised already"):
        check_base(str(path), "nf4")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not a valid JSON file"),
        ('{"hidden_size": 8}', "model_type"),
        ('{"model_type": "of_next_year"}', "of_next_year"),
        ('{"model_type": "mixtral", "num_hidden_layers": "two"}', "num_hidden_layers"),
    ],
)
def test_configuration_that_cannot_be_read_is_one_sentence(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json is no configuration that .* can read") as mistake:
        check_base(str(tmp_path), None)
    assert reason in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_impossible_wishes_are_refused_before_anything_is_read(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(folder("mixtral"))
    check_base(None, None)
    check_base(base, "nf4")
    with pytest.raises(UserError, match=r"null or one of \['nf4'\], got 'int8'"):
        check_base(base, "int8")
    with pytest.raises(UserError, match="for a frozen `base`, got the configuration of a new model"):
        check_base(None, "nf4")
    monkeypatch.setattr(base_model, "find_spec", lambda name: None)
    check_base(base, None)
    with pytest.raises(UserError, match=r'pip install "bitsandbytes>=0.50"'):
        check_base(base, "nf4")
