"""Dense models of one base become a mixture in which each of them is still there, exactly."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.cli_runs import error_of
from helpers.tiny_world import TinyWorld, perturb
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
)

from moextend_pl import cli
from moextend_pl.contracts import UpcycleSpec
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.moe.dispatch import FROZEN_EXPERTS, register

TOKENS = torch.arange(1, 20)[None]
MIXED = re.compile(r"model\.layers\.\d+\.mlp\..*")


def specialist(source: Path, folder: Path, seed: int, chosen: Callable[[str], object] = MIXED.fullmatch) -> Path:
    """Writes a model that learned something in the parameters that are chosen by name, by default its MLPs."""
    model = MistralForCausalLM.from_pretrained(source)
    perturb([p for name, p in model.named_parameters() if chosen(name)], 0.2, seed)
    shutil.copytree(source, folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def specialists(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("specialists")
    # torch rounds SiLU of a part of a row otherwise where the row does not fill its vectors; 64 fills them anywhere.
    wide = MistralConfig.from_pretrained(tiny_world.dense, intermediate_size=64)
    shutil.copytree(tiny_world.dense, root / "base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        MistralForCausalLM(wide).save_pretrained(root / "base")
    return [specialist(root / "base", root / f"expert{seed}", seed) for seed in range(3)]


def assemble(sources: list[Path], out: Path, *more: str) -> list[str]:
    return ["assemble", "--sources", *map(str, sources), "--out", str(out), *more]


def force(model: nn.Module, expert: int, other: int | None) -> None:
    """Lets every router send every token to one expert, beside another one of weight 0."""

    def forced(_: nn.Module, __: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        tokens = len(output[0])
        indices = torch.tensor([[expert] if other is None else [expert, other]]).expand(tokens, -1)
        weights = torch.tensor([[1.0] if other is None else [1.0, 0.0]]).expand(tokens, -1)
        return output[0], weights, indices

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(forced)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", FROZEN_EXPERTS])
@torch.no_grad()
def test_routing_to_one_expert_is_the_source(specialists: list[Path], tmp_path: Path, implementation: str) -> None:
    assert cli.main(assemble(specialists, tmp_path / "out")) == 0
    register()
    expected = [MistralForCausalLM.from_pretrained(folder)(TOKENS).logits for folder in specialists]
    assert not any(torch.equal(expected[0], other) for other in expected[1:])
    for expert, logits in enumerate(expected):
        for other in (None, (expert + 1) % 3):
            model = MixtralForCausalLM.from_pretrained(tmp_path / "out", experts_implementation=implementation)
            force(model, expert, other)
            assert torch.equal(model(TOKENS).logits, logits)


@torch.no_grad()
def test_sources_whose_width_fills_no_vectors_are_there_bit_for_bit_and_computed_to_rounding(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    other = specialist(tiny_world.dense, tmp_path / "other", 3)
    assert cli.main(assemble([tiny_world.dense, other], tmp_path / "out")) == 0
    model, dense = MixtralForCausalLM.from_pretrained(tmp_path / "out"), MistralForCausalLM.from_pretrained(other)
    for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
        stacked = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])
        assert torch.equal(layer.mlp.experts.gate_up_proj[1], stacked)
        assert torch.equal(layer.mlp.experts.down_proj[1], source.mlp.down_proj.weight)
    force(model, 1, None)
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_one_model_again_and_again_is_the_upcycled_one_tensor_by_tensor(tiny_world: TinyWorld, tmp_path: Path) -> None:
    assert cli.main(assemble([tiny_world.dense] * 4, tmp_path / "out", "--seed", "5")) == 0
    model = MoELanguageModel(base=str(tiny_world.dense), upcycle=UpcycleSpec(experts=4, top_k=2, seed=5))
    model.configure_model()
    model.save_pretrained(tmp_path / "upcycled")
    got, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "upcycled"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "upcycled"))
    assert first == second


def test_folder_is_a_base_whose_routers_learn(tiny_world: TinyWorld, specialists: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(assemble(specialists, out, "--top-k", "3")) == 0
    assert cli.main(assemble(specialists, out)) == 2, "a folder that is there already stays"
    assert json.loads((out / "assembly.json").read_text()) == {
        "experts": ["expert0", "expert1", "expert2"], "shared": "expert0", "differ": [], "seed": 0,
    }  # fmt: skip
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert names <= {path.name for path in out.iterdir()}
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tiny_world.language().tokenizer.get_vocab()
    model = MoELanguageModel(base=str(out))
    model.configure_model()
    assert model.num_experts == {0: 3, 1: 3}
    assert model.model.config.num_experts_per_tok == 3
    model.losses(tiny_world.batch(model, "tt"), balanced=False).token.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parts()["routers"])


def test_sources_that_differ_outside_of_mlps_need_a_word(
    specialists: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = specialists[0].parent / "base"
    attentive = specialist(base, tmp_path / "attentive", 7, lambda name: "0.self_attn.q_proj" in name)
    sources, out = [*specialists[:2], attentive], tmp_path / "out"  # one of the others is enough
    assert "1 other tensors that differ, for example model.layers.0.self_attn.q" in error_of(
        capsys, assemble(sources, out)
    )
    assert not out.exists()
    assert cli.main(assemble(sources, out, "--keep-first")) == 0
    assert json.loads((out / "assembly.json").read_text())["differ"] == ["model.layers.0.self_attn.q_proj.weight"]
    model = MixtralForCausalLM.from_pretrained(out)
    force(model, 0, None)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, MistralForCausalLM.from_pretrained(specialists[0])(TOKENS).logits)


def edited(source: Path, folder: Path, **changes: object) -> Path:
    """Copies a model with other words in its configuration."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def rebuilt(source: Path, folder: Path) -> Path:
    """Copies a model of the same sizes as a Llama."""
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "head_dim")
    LlamaForCausalLM(LlamaConfig(**{name: config[name] for name in sizes})).save_pretrained(folder)
    return folder


def without(source: Path, folder: Path, file: str, **content: str) -> Path:
    """Copies a model without a file, or with others."""
    shutil.copytree(source, folder)
    (folder / file).unlink(missing_ok=True)
    for name, text in content.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def reworded(source: Path, folder: Path) -> Path:
    """Copies a model whose tokenizer has one word more."""
    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    return folder


def halved(source: Path, folder: Path) -> Path:
    """Copies a model in 16 bits."""
    shutil.copytree(source, folder)
    MistralForCausalLM.from_pretrained(source).bfloat16().save_pretrained(folder)
    return folder


def lacking(source: Path, folder: Path) -> Path:
    """Copies a model whose files lack the norm behind its layers."""
    shutil.copytree(source, folder)
    model = MistralForCausalLM.from_pretrained(source)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
    model.save_pretrained(folder, state_dict=tensors)
    return folder


MISTAKES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "delta": (lambda s, f: without(s, f, "config.json"), "without a config.json. Name what transformers or"),
    "adapter": (lambda s, f: without(s, f, "none", adapter_config="{}"), "holds an adapter, which would be left out"),
    "weights": (lambda s, f: without(s, f, "model.safetensors"), "Expected model.safetensors in"),
    "family": (rebuilt, "with `model_type` 'llama' where source 0"),
    "biases": (lambda s, f: edited(s, f, model_type="qwen2"), "of the families llama and mistral, without biases"),
    "epsilon": (lambda s, f: edited(s, f, rms_norm_eps=1e-3), "with `rms_norm_eps` 0.001 where source 0"),
    "vocabulary": (reworded, "Expected one vocabulary, got another one in"),
    "type": (halved, "to have one shape and type in all sources"),
    "names": (lacking, "got model.norm.weight in only one of source 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_sources_that_do_not_fit_are_refused_and_leave_nothing(
    tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    make, sentence = MISTAKES[mistake]
    other = make(tiny_world.dense, tmp_path / "other")
    assert sentence in error_of(capsys, assemble([tiny_world.dense, other], tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_layers_that_the_files_lack_are_refused(
    tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deeper = edited(tiny_world.dense, tmp_path / "deeper", num_hidden_layers=3)
    assert "model.layers.2.mlp.down_proj.weight is missing or too much" in error_of(
        capsys, assemble([deeper, deeper], tmp_path / "out")
    )


@pytest.mark.parametrize(
    ("sources", "more", "sentence"),
    [
        (1, [], "Expected two `--sources` or more, got 1"),
        (2, ["--top-k", "3"], "in 2..2 (the sources), got 3"),
        (2, ["--top-k", "1"], "got 1. One expert alone has the weight 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str], sources: int, more: list[str],
    sentence: str,
) -> None:  # fmt: skip
    assert sentence in error_of(capsys, assemble([tiny_world.dense] * sources, tmp_path / "out", *more))
