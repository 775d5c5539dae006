"""vLLM's engine answers as transformers does; runs where vLLM is installed, some minutes on a CPU."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.tiny_world import QUESTION, TinyWorld, build_tiny_world, make_plan, perturb, picture, tiny_mixtral  # noqa: E402

from moextend_pl.contracts import TrainPlan  # noqa: E402
from moextend_pl.export.folder import write_model  # noqa: E402
from moextend_pl.models.encoder import VisionEncoder  # noqa: E402
from moextend_pl.models.language import MoELanguageModel  # noqa: E402
from moextend_pl.models.moextend import MoExtend  # noqa: E402
from moextend_pl.models.projector import Projector  # noqa: E402

LENGTH = 24
PARTS = ("projector", "new_experts", "new_routers", "calibration")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"))


def exported(world: TinyWorld, folder: Path, routing: str) -> Path:
    """Returns the folder of a model whose heads are as wide as vLLM wants them on a CPU."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    language = MoELanguageModel(base=str(world.base))
    tiny_mixtral(len(language.tokenizer), **sizes).save_pretrained(folder / "base")
    language.tokenizer.save_pretrained(folder / "base")
    model = MoExtend(
        encoder=VisionEncoder(path=str(world.encoder)),
        projector=Projector(kind="mlp2x_gelu"),
        language=MoELanguageModel(base=str(folder / "base")),
    )
    model.extension_plan, model.train_plan = make_plan(sources=(1, 2), routing=routing), TrainPlan(PARTS)
    model.configure_model()
    perturb([parameter for name in PARTS for parameter in model.parts()[name]])
    write_model(model.requires_grad_(False).eval(), folder / "hf")
    return folder / "hf"


def chats() -> list[list[dict[str, Any]]]:
    def seen(*numbers: int) -> list[dict[str, Any]]:
        urls = ["data:image/png;base64," + base64.b64encode(picture(number)).decode() for number in numbers]
        return [{"type": "image_url", "image_url": {"url": url}} for url in urls]

    asked: list[list[dict[str, Any]]] = []
    for number in range(3):
        asked.append([{"role": "user", "content": [*seen(number), {"type": "text", "text": QUESTION}]}])
        asked.append([{"role": "user", "content": "a small " * number + f"picture is red . {QUESTION}"}])
    first = {"role": "user", "content": [*seen(1, 2), {"type": "text", "text": QUESTION}]}
    asked.append([first, {"role": "assistant", "content": "red"}, {"role": "user", "content": "is it blue ?"}])
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["masked", "masked_tokens", "open"])
def test_engine_answers_texts_and_pictures_in_one_batch_as_transformers_does(
    world: TinyWorld, tmp_path: Path, routing: str
) -> None:
    folder = exported(world, tmp_path, routing)
    asked, told = tmp_path / "asked.json", tmp_path / "told.json"
    asked.write_text(json.dumps({"chats": chats(), "length": LENGTH}), encoding="utf-8")
    # One process, so that all ends with it; half a gigabyte is more than the smallest cache needs.
    surroundings = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    script = [sys.executable, str(Path(__file__).with_name("ask_engine.py"))]
    subprocess.run([*script, str(folder), str(asked), str(told)], check=True, timeout=900, env=surroundings)
    got = json.loads(told.read_text(encoding="utf-8"))
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for chat, prompt, answer in zip(chats(), got["prompts"], got["answers"], strict=True):
        inputs = processor.apply_chat_template(chat, **options)
        ids_S = inputs["input_ids"][0]
        assert ids_S.masked_fill(ids_S == processor.image_token_id, 0).tolist() == prompt
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=LENGTH, eos_token_id=-1)
        assert made[0, len(ids_S) :].tolist() == answer
    assert "out of vocabulary" in got["refused"]
