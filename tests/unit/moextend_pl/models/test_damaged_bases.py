"""A base or tower whose files are damaged is refused in one sentence that names the file, and no code in it is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import TinyWorld
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from moextend_pl.contracts import UserError
from moextend_pl.models.base_model import load_base
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.tower import make_tower
from moextend_pl.runs.fingerprints import check_weight_file, check_weights

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_world.base, tmp_path / "base")


@pytest.fixture
def sharded(base: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / WEIGHTS).unlink()
    model.save_pretrained(base, max_shard_size="40KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    return base


def header(length: int, text: bytes = b"{}") -> Callable[[Path], object]:
    return lambda base: (base / WEIGHTS).write_bytes(length.to_bytes(8, "little") + text)


def change_tensors(base: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(base / WEIGHTS)
    change(tensors)
    save_file(tensors, base / WEIGHTS, {"format": "pt"})


def pickled_only(base: Path) -> None:
    (base / WEIGHTS).rename(base / "pytorch_model.bin")


def offsets_beyond(base: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    header(len(text), text)(base)


def edit_config(**changes: object) -> Callable[[Path], object]:
    def edit(base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (
        lambda base: (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:-100]),
        r"model\.safetensors: damaged or cut short .tensors of \d+ bytes announced, \d+ bytes there.*copy it again",
    ),
    "missing": (lambda base: (base / WEIGHTS).unlink(), r"Expected model\.safetensors in .*found no weights"),
    "pickled only": (pickled_only, r"found only pytorch_model\.bin, which is pickled and never opened"),
    "empty": (lambda base: (base / WEIGHTS).write_bytes(b""), "a header of 0 bytes in a file of 0"),
    "header of 2^62 bytes": (header(2**62), r"a header of 4611686018427387904 bytes in a file of 10"),
    "header that is no JSON": (header(5, b"hello"), "damaged or cut short"),
    "header that is a list": (header(2, b"[]"), "damaged or cut short"),
    "header nested without end": (header(90_000, b"[" * 90_000), "damaged or cut short"),
    "offsets beyond the file": (offsets_beyond, "tensors of 4398046511104 bytes announced, 0 bytes there"),
    "one tensor missing": (
        lambda base: change_tensors(base, lambda tensors: tensors.pop("model.norm.weight")),
        r"lack 1 weights of its MixtralForCausalLM, for example model\.norm\.weight",
    ),
    "another shape": (edit_config(vocab_size=7), r"weights in .*do not fit its config\.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_base_is_one_sentence(base: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(base)
    with pytest.raises(UserError, match=message) as caught:
        MoELanguageModel(base=str(base)).configure_model()
    assert "\n" not in str(caught.value)


def test_base_in_4_bits_lacks_no_weight_that_is_not_packed_either(base: Path) -> None:
    change_tensors(base, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"for example model\.norm\.weight"):
        load_base(str(base), "nf4")


SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (lambda base: max(base.glob("model-*")).unlink(), r"Expected weights in .*model-.*found no file"),
    "shard cut short": (
        lambda base: max(base.glob("model-*")).write_bytes(max(base.glob("model-*")).read_bytes()[:-1]),
        "damaged or cut short",
    ),
    "shards exchanged": (
        lambda base: shutil.copy(min(base.glob("model-0*")), max(base.glob("model-0*"))),
        r"expected the \d+ tensors that model\.safetensors\.index\.json places there, it lacks",
    ),
    "index that is no JSON": (
        lambda base: (base / f"{WEIGHTS}.index.json").write_text("{"),
        r"index\.json: damaged .JSONDecodeError",
    ),
    "index that names a file elsewhere": (
        lambda base: (base / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}'),
        r"index\.json: damaged .*not named by a file beside it",
    ),
}


@pytest.mark.parametrize("damage", SHARDS)
def test_damaged_shards_are_one_sentence(sharded: Path, damage: str) -> None:
    check_weights(sharded)
    spoil, message = SHARDS[damage]
    spoil(sharded)
    with pytest.raises(UserError, match=message):
        check_weights(sharded)


def test_whole_file_tells_its_names(base: Path) -> None:
    assert check_weight_file(base / WEIGHTS) == set(load_file(base / WEIGHTS))


def test_damaged_towers_are_one_sentence(tiny_world: TinyWorld, tmp_path: Path) -> None:
    tower = shutil.copytree(tiny_world.encoder, tmp_path / "tower")
    weights = (tower / "encoder.safetensors").read_bytes()
    (tower / "encoder.safetensors").write_bytes(weights[:-8])
    with pytest.raises(UserError, match=r"encoder\.safetensors: damaged or cut short"):
        VisionEncoder(path=str(tower)).configure_model()
    (tower / "encoder.json").write_text("{")
    with pytest.raises(UserError, match=r"encoder\.json: damaged"):
        VisionEncoder(path=str(tower))


def test_a_tower_of_transformers_lacks_no_weight_that_is_read(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path)
    make_tower(str(tmp_path), with_weights=True)
    name = next(name for name in load_file(tmp_path / WEIGHTS) if "layers.1" in name)
    change_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=r"lack 1 weights of its CLIPVisionModel, for example .*layers\.1"):
        make_tower(str(tmp_path), with_weights=True)


def test_code_that_comes_with_a_base_is_refused_without_a_question(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (base / "evil.py").write_text("raise SystemExit('run')")
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    edit_config(model_type="evil", auto_map=names)(base)
    with pytest.raises(UserError, match=r"brings code of its own \(`auto_map`.*never run here"):
        MoELanguageModel(base=str(base))
    edit_config(model_type="mixtral")(base)  # known here, so that its own code is not needed
    MoELanguageModel(base=str(base)).configure_model()
