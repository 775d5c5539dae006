"""A base is a folder, a name in a hub, or a GGUF file, and computes what the model does that lies there."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.loopback_hub import COMMIT, loopback_hub
from helpers.tiny_gguf import TEMPLATE, WORDS, tiny_llama, tiny_qwen3_moe, write_gguf
from helpers.tiny_world import TinyWorld, make_plan, perturb
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from moextend_pl.contracts import TrainPlan, UpcycleSpec, UserError
from moextend_pl.export.folder import export_run
from moextend_pl.models import model_folder
from moextend_pl.models.delta import save_delta
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.model_folder import base_folder
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector

TOKENS = torch.arange(len(WORDS))[None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moextend_pl" / "gguf"


def seeing(world: TinyWorld, base: Path) -> MoExtend:
    language = MoELanguageModel(base=str(base))
    model = MoExtend(encoder=VisionEncoder(path=str(world.encoder)), projector=Projector(), language=language)
    model.extension_plan = make_plan((0, 1), (2, 3))
    model.train_plan = TrainPlan(("projector", "new_experts", "new_routers", "calibration"))
    model.configure_model()
    return model.eval()


@pytest.mark.parametrize("upcycle", [None, UpcycleSpec(experts=4, top_k=2)], ids=["dense", "upcycled"])
@torch.no_grad()
def test_a_file_gives_the_model_its_tokenizer_and_its_template(
    tmp_path: Path, cache: Path, upcycle: UpcycleSpec | None
) -> None:
    oracle, file = tiny_llama(), tmp_path / "tiny.gguf"
    write_gguf(oracle, file)
    # What lies beside the file is another model's.
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "chat_template": "no"}')
    language = MoELanguageModel(base=str(file), dense=upcycle is None, upcycle=upcycle)
    language.configure_model()
    logits = language.eval().model(TOKENS).logits
    if upcycle is None:
        assert torch.equal(logits, oracle(TOKENS).logits)
    # Two weights that sum to 1 round: the dense function to rounding.
    torch.testing.assert_close(logits, oracle(TOKENS).logits, atol=1e-5, rtol=1e-5)
    words = ["the", "Ġ", "red", "Ġ", "is", "Ġ", "blue", "<|im_end|>"]
    assert language.tokenizer.tokenize("the red is blue<|im_end|>") == words
    assert language.tokenizer.get_vocab() == {word: place for place, word in enumerate(WORDS)}
    assert language.tokenizer.chat_template == TEMPLATE
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [""]  # nothing half-made


@pytest.mark.slow
def test_a_file_with_experts_goes_through_a_run(tiny_world: TinyWorld, tmp_path: Path, cache: Path) -> None:
    oracle, file = tiny_qwen3_moe(), tmp_path / "tiny.gguf"
    write_gguf(oracle, file)
    model = seeing(tiny_world, file)
    perturb([p for p in model.parameters() if p.requires_grad], 0.1)
    save_delta(model, tmp_path / "run")
    with torch.no_grad():
        logits = model.language.model(TOKENS).logits
        assert torch.equal(logits, oracle(TOKENS).logits)  # no picture, no new expert
    moved = file.rename(tmp_path / "moved.gguf")
    shutil.rmtree(cache)
    with pytest.raises(UserError, match="name its folder by `base`, on the command line by `--base`"):
        MoExtend.load(tmp_path / "run")
    loaded = MoExtend.load(tmp_path / "run", base=moved)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    export_run(tmp_path / "run", tmp_path / "exported", base=moved)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        assert torch.equal(whole(input_ids=TOKENS).logits, logits)


def test_a_base_is_fetched_by_its_name(tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    shutil.copytree(tiny_world.base, tmp_path / "hub/org/moe")
    with loopback_hub(tmp_path / "hub") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        language = MoELanguageModel(base="org/moe")
        with pytest.raises(UserError, match="Expected 'org/none' in the cache of the hub or in the hub itself"):
            MoELanguageModel(base="org/none")
    assert COMMIT in str(language.base)
    language.configure_model()
    stock = AutoModelForCausalLM.from_pretrained(tiny_world.base)
    assert all(torch.equal(a, b) for a, b in zip(language.model.parameters(), stock.parameters(), strict=True))
    assert base_folder("org/moe") == language.base  # the hub is gone, its cache is there
    # A folder that a stage has yet to make is no name of a hub where its parent is there.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="found no config.json. Run the stage that makes it"):
        MoELanguageModel(base="runs/language")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (Path.unlink, "Expected a GGUF file at .*tiny.gguf, found none"),
        (lambda file: file.write_bytes(b"PK" * 100), "is no GGUF file, which begins with the letters GGUF"),
        (cut, "is no GGUF file that the installed transformers can read .*Copy it again"),
    ],
)
def test_a_damaged_file_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path, damage, sentence: str) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama(), file)
    damage(file)
    with pytest.raises(UserError, match=sentence):
        MoELanguageModel(base=str(file), dense=True)
    assert [path for path in cache.glob("*") if path.is_dir()] == []


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(model_folder, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(UserError, match=r'needs gguf, not installed: pip install "moextend_pl\[gguf\]"'):
        MoELanguageModel(base=str(file))
