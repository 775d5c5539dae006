"""An exported folder is a whole model where this package is not installed: its code is in it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiles import SIZES, photo, tiled, write_tagged_base
from helpers.tiny_world import QUESTION, TinyWorld, make_plan, perturb
from safetensors.torch import load_file, save_file

from moextend_pl.contracts import UpcycleSpec
from moextend_pl.export.folder import write_model
from moextend_pl.export.travelling_code import AUTO_MAP, STAND_INS, travelling_files
from moextend_pl.samples.messages import ask

BYTES, FILES = 255_000, 41
ROOT = Path(__file__).parents[4]
INPUTS = ("input_ids", "attention_mask", "pixel_values", "tiles")
PICTURES = ask(QUESTION, [photo(SIZES[1]), photo(SIZES[0])])
PARTS = ("projector", "new_experts", "new_routers", "calibration")
ALONE = """
import sys
sys.modules["moextend_pl"] = None  # as where it is not installed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

asked = [{"role": "user", "content": [{"type": "text", "text": "what is the color ?"}]}]
options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    batch = load_file(folder + ".inputs")
    logits = model(**batch).logits.detach().contiguous()
    ids = processor.apply_chat_template(asked, **options)["input_ids"]
    save_file({"logits": logits, "ids": ids, "answers": model.generate(**batch)}, folder + ".out")
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
    looking = tiled(tiny_world, write_tagged_base(tiny_world, tmp_path / "base"), looks=1, thumbnail=True)
    looking.configure_model()
    perturb(looking.parts()["projector"], 0.3)
    looking.requires_grad_(False).eval()
    batches = [tiny_world.batch(model, "it", generation=True), looking.prompt(PICTURES)]
    for name, each, batch in zip(("cumo", "looking"), (model, looking), batches, strict=True):
        write_model(each, tmp_path / name)
        given = {key: batch[key].contiguous() for key in INPUTS if key in batch}
        save_file(given, tmp_path / f"{name}.inputs")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    folders = [str(tmp_path / name) for name in ("cumo", "looking")]
    subprocess.run([sys.executable, "-c", ALONE, *folders], check=True, cwd=tmp_path, env=environment)
    for folder, each, batch in zip(folders, (model, looking), batches, strict=True):
        got = load_file(f"{folder}.out")
        with torch.no_grad():
            expected = each.language(batch, each.embed(batch))
        torch.testing.assert_close(got["logits"], expected, atol=1e-5, rtol=0)
        made = got["answers"][:, batch["input_ids"].shape[1] :]
        answers = [text.strip() for text in each.language.tokenizer.batch_decode(made, skip_special_tokens=True)]
        assert answers == each.answer(batch)
        assert got["ids"].shape[1] > 1
