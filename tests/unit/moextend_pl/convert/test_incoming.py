"""What is read from a published checkpoint is checked first and computes what it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.published import SIZES, convert
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from moextend_pl.contracts import UserError
from moextend_pl.convert.files import TensorFiles
from moextend_pl.convert.incoming import language_config
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.manifest import Manifest, read_manifest

# As in the files of CuMo-mistral-7b, written by transformers v4, but for the rotation, which is faster to be seen.
AS_PUBLISHED = {**SIZES, "rope_theta": 50.0, "sliding_window": None, "torch_dtype": "float32"}
STOCK = {"mistral": (MistralConfig, MistralForCausalLM), "mixtral": (MixtralConfig, MixtralForCausalLM)}


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}], ids=["plain", "scaled"])
@pytest.mark.parametrize("kind", STOCK)
@torch.no_grad()
def test_language_model_of_a_config_of_transformers_v4_rotates_positions_as_published(
    published: Callable, kind: str, scaling: dict | None, tmp_path: Path
) -> None:
    source, _ = published(f"cumo {kind}")
    own = {**AS_PUBLISHED, "rope_scaling": scaling, "head_dim": 8}
    own |= {"num_local_experts": 4} if kind == "mixtral" else {}
    (source / "config.json").write_text(json.dumps({**own, "model_type": f"llava_{kind}", "num_experts": 2}))
    convert("cumo", source, tmp_path / "run", "--heads", "2")
    make_config, make = STOCK[kind]
    stock = make(make_config(**own)).eval()
    weights = make.from_pretrained(tmp_path / "stock", dtype=torch.float32).state_dict()
    stock.load_state_dict(weights)
    ids = torch.arange(1, 25)[None]
    logits = MoExtend.load(tmp_path / "run").language.model(ids).logits
    torch.testing.assert_close(logits, stock(ids).logits)
    assert language_config(TensorFiles(source).config()).torch_dtype == torch.float32


FOREIGN_SHAPES = {
    "model.vision_tower.vision_model.encoder.layers.1.experts.2.fc1.weight": "in one shape",
    "model.vision_tower.vision_model.encoder.layers.1.layer_norm1.weight": "the shapes that config.json",
    "model.vision_tower.vision_model.embeddings.patch_embedding.weight": "of a CLIP tower",
    "model.mm_projector.gate.weight": "the shapes that config.json",
    "model.layers.1.mlp.up_proj.weight": "the shapes that config.json",
    "model.embed_tokens.weight": "the shapes that config.json",
}


@pytest.mark.parametrize("key", FOREIGN_SHAPES)
def test_tensor_of_another_shape_is_refused_before_anything_is_written(
    published: Callable, key: str, tmp_path: Path
) -> None:
    source, _ = published("cumo mistral")
    file = next(f for f in source.glob("*.safetensors") if key in load_file(f))
    save_file({**load_file(file), key: torch.ones(5, 7)}, file)
    with pytest.raises(UserError, match=FOREIGN_SHAPES[key]):
        convert("cumo", source, tmp_path / "run", "--heads", "2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["weight_scale.weight_scale.0.weight", "experts.4.w2.weight"])
def test_new_expert_of_another_shape_is_refused(published: Callable, key: str, tmp_path: Path) -> None:
    source, _ = published("moextend")
    key = f"model.layers.1.block_sparse_moe.{key}"
    file = next(f for f in source.glob("*.safetensors") if key in load_file(f))
    save_file({**load_file(file), key: torch.ones(5, 7)}, file)
    with pytest.raises(UserError, match="the shapes that config.json"):
        convert("moextend", source, tmp_path / "run", "--heads", "2")
    assert not (tmp_path / "run").exists()


def test_projector_that_does_not_fit_the_scales_is_refused(published: Callable, tmp_path: Path) -> None:
    source, _ = published("cumo mistral")
    data = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**data, "scales": [1, 2, 3]}))
    with pytest.raises(UserError, match=r"mm_projector\.experts\.0\.0\.weight \(for"):
        convert("cumo", source, tmp_path / "run", "--heads", "2")


def test_report_is_written_last(published: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manifest, "save", lambda manifest: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        convert("cumo", published("cumo mistral")[0], tmp_path / "run", "--heads", "2")
    assert not (tmp_path / "run" / "conversion.json").exists()


def one_file(source: Path, file: Path) -> Path:
    """Moves the shards of a checkpoint into one file, with the configuration beside it."""
    file.parent.mkdir()
    save_file(dict(TensorFiles(source)), file)
    (file.parent / "config.json").write_text((source / "config.json").read_text())
    return file


def test_file_of_a_whole_model_is_read_with_the_config_beside_it(published: Callable, tmp_path: Path) -> None:
    file = one_file(published("cumo mistral")[0], tmp_path / "one" / "model.safetensors")
    convert("cumo", file, tmp_path / "run", "--heads", "2")
    assert MoExtend.load(tmp_path / "run").language.model.config.hidden_size == SIZES["hidden_size"]


def test_file_of_a_part_beside_the_config_of_a_whole_model_is_read_with_its_scales(
    published: Callable, tmp_path: Path
) -> None:
    source, tensors = published("cumo mistral")
    file = source / "parts" / "clip.bin"
    file.parent.mkdir()
    torch.save({name: t for name, t in tensors.items() if "vision_tower" in name}, file)
    (file.parent / "config.json").write_text(json.dumps({"model_type": "llava_mistral", "scales": [1, 2]}))
    convert("cumo", file, tmp_path / "run", "--heads", "2")
    manifest = read_manifest(tmp_path / "run")
    assert set(manifest.model) == {"encoder"}
    assert manifest.model["encoder"]["scales"] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_phi"}, r"Expected `model_type` in config\.json .*'llava_mixtral'\], got 'llava_phi'"),
        ({"hidden_size": "wide"}, r"Expected the values of a mistral in config\.json"),
        (None, "Expected a config.json beside"),
    ],
)
def test_config_of_no_known_language_model_is_refused(
    published: Callable, change: dict | None, message: str, tmp_path: Path
) -> None:
    source, _ = published("cumo mistral")
    data = json.loads((source / "config.json").read_text())
    if change is None:
        (source / "config.json").unlink()
    else:
        (source / "config.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(UserError, match=message) as caught:
        convert("cumo", source, tmp_path / "run", "--heads", "2")
    assert "\n" not in str(caught.value)
