"""An exported folder is a whole model where this package is not installed: its code is in it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import TinyWorld, make_plan, perturb
from safetensors.torch import load_file, save_file

from moextend_pl.contracts import UpcycleSpec
from moextend_pl.export.folder import write_model
from moextend_pl.export.travelling_code import AUTO_MAP, STAND_INS, travelling_files

BYTES, FILES = 250_000, 41
ROOT = Path(__file__).parents[4]
PARTS = ("projector", "new_experts", "new_routers", "calibration")
ALONE = """
import sys
sys.modules["moextend_pl"] = None  # as where it is not installed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, inputs, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
batch = load_file(inputs)
logits = model(**batch).logits
asked = [{"role": "user", "content": [{"type": "text", "text": "what is the color ?"}]}]
options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
ids = processor.apply_chat_template(asked, **options)["input_ids"]
save_file({"logits": logits.detach().contiguous(), "ids": ids, "answers": model.generate(**batch)}, out)
"""


def test_code_is_small_whole_and_that_of_the_package() -> None:
    files = travelling_files()
    assert len(files) <= FILES
    assert sum(map(len, files.values())) <= BYTES
    bodies = {ast.dump(node) for path in (ROOT / "moextend_pl").rglob("*.py") for node in definitions(path.read_text())}
    for name, text in files.items():
        imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]
        assert {f"{node.module}.py" for node in imported} <= set(files), name
        assert "from moextend_pl." not in text
        if name.removesuffix(".py") not in {module.replace(".", "_") for module in STAND_INS}:
            assert {ast.dump(node) for node in definitions(text)} <= bodies, name
    for place in AUTO_MAP.values():
        file, kind = place.split(".")
        assert f"class {kind}(" in files[f"{file}.py"]


def definitions(text: str) -> list[ast.stmt]:
    return [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


@pytest.mark.slow
def test_folder_alone_is_the_same_model(tiny_world: TinyWorld, tmp_path: Path) -> None:
    spec = UpcycleSpec(experts=4, top_k=2)
    model = tiny_world.cumo(dense=False, encoder=spec, projector=spec)
    model.extension_plan = make_plan(init="copy")
    model.configure_model()
    perturb([parameter for name in PARTS for parameter in model.parts()[name]], 0.2)
    model.requires_grad_(False).eval()  # as a loaded run is: a tower that learns encodes pictures as they come
    write_model(model, tmp_path / "hf")
    batch = tiny_world.batch(model, "it", generation=True)
    names = ("input_ids", "attention_mask", "pixel_values")
    save_file({name: batch[name].contiguous() for name in names}, tmp_path / "inputs")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    arguments = [str(tmp_path / name) for name in ("hf", "inputs", "out")]
    subprocess.run([sys.executable, "-c", ALONE, *arguments], check=True, cwd=tmp_path, env=environment)
    got = load_file(tmp_path / "out")
    with torch.no_grad():
        expected = model.language(batch, model.embed(batch))
    torch.testing.assert_close(got["logits"], expected, atol=1e-6, rtol=0)
    made = got["answers"][:, batch["input_ids"].shape[1] :]
    answers = [text.strip() for text in model.language.tokenizer.batch_decode(made, skip_special_tokens=True)]
    assert answers == model.answer(batch)
    assert got["ids"].shape[1] > 1
