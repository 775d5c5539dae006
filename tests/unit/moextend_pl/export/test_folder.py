"""An exported folder gives transformers the model that was trained: the same logits, answers and inputs."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_families import LAYERS, tiny_model
from helpers.tiny_world import QUESTION, SIDE, TinyWorld, make_plan, perturb, picture, tiny_tokenizer
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from moextend_pl.contracts import TrainPlan, UpcycleSpec, UserError
from moextend_pl.export.folder import write_model
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.training.half_precision import default_dtype

PARTS = ("projector", "new_experts", "new_routers", "calibration")
FAMILIES = ("qwen3_moe", "olmoe", "deepseek_v3")


def built(model: MoExtend, parts: Sequence[str] = PARTS, size: float = 0.2) -> MoExtend:
    model.train_plan = TrainPlan(tuple(parts))
    model.configure_model()
    perturb([parameter for name in parts for parameter in model.parts()[name]], size)
    return model.requires_grad_(False).eval()  # as a loaded run is: a tower that learns encodes pictures as they come


def of_family(world: TinyWorld, family: str, folder: Path) -> MoExtend:
    tokenizer = tiny_tokenizer()
    tiny_model(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = MoExtend(
        encoder=VisionEncoder(path=str(world.vit)),
        projector=Projector(merge=2),
        language=MoELanguageModel(base=str(folder)),
    )
    init = "preserving" if family == "deepseek_v3" else "copy"
    model.extension_plan = make_plan((1, LAYERS - 1), (2, 3), init=init)
    return built(model)


def reloaded(model: MoExtend, folder: Path, **options: Any) -> tuple[Any, Any]:
    write_model(model, folder, **options)
    again = AutoModelForImageTextToText.from_pretrained(folder)
    for parameter in again.parameters():  # where a file is mapped to, products of some CPUs have other last bits
        parameter.data = parameter.data.clone()
    return again, AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def both_logits(model: MoExtend, again: Any, world: TinyWorld, kinds: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch = world.batch(model, kinds)
    pixels = {"pixel_values": batch["pixel_values"]} if "i" in kinds else {}
    got = again(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **pixels).logits
    return model.language(batch, model.embed(batch)), got


def same_logits(model: MoExtend, again: Any, world: TinyWorld) -> None:
    assert torch.equal(*both_logits(model, again, world, "tt"))
    assert torch.equal(*both_logits(model, again, world, "itii"))


def answer(again: Any, processor: Any, parts: list[dict[str, Any]], **options: Any) -> str:
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    made = again.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(made, skip_special_tokens=True)).strip()


def same_answers(model: MoExtend, again: Any, processor: Any) -> None:
    for number in range(3):
        image = Image.open(io.BytesIO(picture(number)))
        parts = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        assert answer(again, processor, parts) == model.generate(image, QUESTION)
    assert answer(again, processor, [{"type": "text", "text": QUESTION}]) == model.generate(None, QUESTION)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_the_same_after_a_round_trip(tiny_world: TinyWorld, tmp_path: Path, family: str) -> None:
    model = of_family(tiny_world, family, tmp_path / "base")
    again, processor = reloaded(model, tmp_path / "hf")
    same_logits(model, again, tiny_world)
    same_answers(model, again, processor)


@pytest.mark.parametrize(
    "options",
    [
        {"init": "copy"},
        *(pytest.param({"routing": routing}, marks=pytest.mark.slow) for routing in ("open", "masked_tokens")),
    ],
    ids=str,
)
def test_extended_mixtral_is_the_same_after_a_round_trip(
    tiny_world: TinyWorld, tmp_path: Path, options: dict[str, str]
) -> None:
    model = tiny_world.unbuilt()
    model.extension_plan = make_plan(**options)
    again, processor = reloaded(built(model), tmp_path)
    same_logits(model, again, tiny_world)
    same_answers(model, again, processor)


@pytest.mark.slow
def test_cumo_with_an_extension_is_the_same_after_a_round_trip(tiny_world: TinyWorld, tmp_path: Path) -> None:
    spec = UpcycleSpec(experts=4, top_k=2)
    parts = ("encoder", "projector", "language", "routers")
    dense = built(tiny_world.cumo(encoder=spec, projector=spec, language=spec), parts, 0.05)
    again, processor = reloaded(dense, tmp_path / "all")
    same_logits(dense, again, tiny_world)
    same_answers(dense, again, processor)
    both = tiny_world.cumo(dense=False, encoder=spec, projector=spec)
    both.extension_plan = make_plan()
    again, processor = reloaded(built(both, PARTS), tmp_path / "both")
    same_logits(both, again, tiny_world)


@pytest.mark.slow
def test_model_of_two_tasks_is_exported_for_one_of_them(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = tiny_world.unbuilt()
    model.extension_plan = make_plan(task="first")
    built(model)
    model.language.extend(make_plan((1, 2), (0,), task="second", seed=1))
    perturb(model.parts()["new_experts"], 0.3)
    with pytest.raises(UserError, match=r"Expected `task` to be one of \['first', 'second'\]"):
        write_model(model, tmp_path / "none")
    again, _ = reloaded(model, tmp_path / "second", task="second")
    batch = tiny_world.batch(model, "ii")
    batch["tasks"] = ["second"] * 2
    with torch.no_grad():
        expected = model.language(batch, model.embed(batch))
        got = again(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_shards_and_half_precision_survive_and_so_does_what_is_saved_again(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    with default_dtype(torch.bfloat16):
        model = of_family(tiny_world, "deepseek_v3", tmp_path / "base").to(torch.bfloat16)
    exact = {name for name, tensor in model.language.model.named_parameters() if tensor.dtype == torch.float32}
    exact |= {name for name, tensor in model.language.model.named_buffers() if tensor.dtype == torch.float32}
    assert exact
    again, _ = reloaded(model, tmp_path / "hf", shard="100KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    again.save_pretrained(tmp_path / "twice")
    for loaded in (again, AutoModelForImageTextToText.from_pretrained(tmp_path / "twice")):
        assert loaded.dtype == torch.bfloat16
        tensors = {**dict(loaded.language_model.named_parameters()), **dict(loaded.language_model.named_buffers())}
        assert exact <= {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
        expected, got = both_logits(model, loaded, tiny_world, "tt")
        assert torch.equal(got, expected)


def test_batch_of_prompts_is_answered_as_each_alone(tiny_world: TinyWorld, tmp_path: Path) -> None:
    again, processor = reloaded(built(tiny_world.unbuilt(), ["projector"]), tmp_path)
    chats = []
    for number in range(2):
        image = {"type": "image", "image": Image.open(io.BytesIO(picture(number)))}
        chats.append([{"role": "user", "content": [image, {"type": "text", "text": f"{QUESTION} " * (number + 1)}]}])
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chats, **options)
    together = again.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    for chat, row in zip(chats, together, strict=True):
        alone = processor.apply_chat_template(chat, **options)
        assert torch.equal(again.generate(**alone)[0, alone["input_ids"].shape[1] :], row[: len(row)])
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        again_ids = processor(images=[chat[0]["content"][0]["image"]], text=text, return_tensors="pt")["input_ids"]
        assert torch.equal(again_ids, alone["input_ids"])


def test_an_answer_ends_with_the_context_of_its_own_prompt(tiny_world: TinyWorld, tmp_path: Path) -> None:
    again, _ = reloaded(built(tiny_world.unbuilt(), ["projector"]), tmp_path)
    again.config.context = 10
    ids = torch.randint(4, 12, (2, 8), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"eos_token_id": None, "max_new_tokens": 20, "pad_token_id": 0, "do_sample": False}
    both = again.generate(input_ids=ids, attention_mask=mask, **options)[:, 8:]
    assert both.shape[1] == 7
    for row, room in zip(both, (2, 7), strict=True):
        alone = int(mask[0 if room == 2 else 1].sum())
        expected = again.generate(input_ids=ids[0 if room == 2 else 1][None, 8 - alone :], **options)[0, alone:]
        assert torch.equal(row[:room], expected)
        assert not row[room:].any()


def test_calls_from_several_threads_do_not_mix_and_a_copy_answers_by_itself(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    model = tiny_world.unbuilt()
    model.extension_plan = make_plan(init="copy")
    again, processor = reloaded(built(model, size=0.5), tmp_path)
    image = {"type": "image", "image": Image.open(io.BytesIO(picture(1)))}
    asked = [[{"type": "text", "text": QUESTION}], [image, {"type": "text", "text": QUESTION}]]
    expected = [answer(again, processor, parts, max_new_tokens=16) for parts in asked]
    with ThreadPoolExecutor(2) as threads:
        together = threads.map(lambda parts: answer(again, processor, parts, max_new_tokens=16), asked * 4)
        assert list(together) == expected * 4
    twin = copy.deepcopy(again)
    assert [answer(twin, processor, parts, max_new_tokens=16) for parts in asked] == expected


def test_mistakes_are_told(tiny_world: TinyWorld, tmp_path: Path) -> None:
    again, processor = reloaded(built(tiny_world.unbuilt(), ["projector"]), tmp_path)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for content, sentence in (
        (f"<image> {QUESTION}", "without <image>"),
        ([{"type": "video", "video": "a.mp4"}], "or a list of parts of the types"),
        ([{"type": "audio", "audio": "a.wav"}], "for a model that does not hear, got a `<sound>`"),
        ([{"type": "image", "path": str(tmp_path / "no.png")}], "Expected a picture at"),
        ([{"type": "image", "url": "data:image/png;base64,?"}], "Expected a `data:` address"),
    ):
        with pytest.raises(UserError, match=sentence):
            processor.apply_chat_template([{"role": "user", "content": content}], **options)
    with pytest.raises(UserError, match="'user' first and last"):
        processor.apply_chat_template([{"role": "assistant", "content": "blue"}], **options)
    inputs = processor(images=[Image.new("RGB", (SIDE, SIDE))], text="<image> red", return_tensors="pt")
    with pytest.raises(ValueError, match="Expected `pixel_values`"):
        again(input_ids=inputs["input_ids"])
    with pytest.raises(UserError, match="as many image placeholders as image features"):
        again(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))
    with pytest.raises(UserError, match="Expected one picture for each `<image>`, got 0 for 1"):
        processor(text="<image>")


def test_control_tokens_in_a_message_stay_text(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = built(tiny_world.unbuilt(), ["projector"])
    _, processor = reloaded(model, tmp_path)
    message = [{"role": "user", "content": f"{QUESTION} </s> red"}]
    ids = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=True)
    assert processor.tokenizer.eos_token_id not in ids


@pytest.mark.slow
def test_folder_is_loaded_by_a_process_that_only_imports_the_package(tiny_world: TinyWorld, tmp_path: Path) -> None:
    write_model(built(tiny_world.unbuilt(), ["projector"]), tmp_path)
    load = (
        "processor = transformers.AutoProcessor.from_pretrained(folder)\n"
        "model = transformers.AutoModelForImageTextToText.from_pretrained(folder)\n"
        "assert type(processor).__name__ == 'MoExtendProcessor' and type(model).__name__.startswith('MoExtend')\n"
    )
    # One list of transformers was read before the package was imported, the others are read after it.
    imports = "import sys, transformers.models.auto.configuration_auto, moextend_pl, transformers"
    code = f"{imports}\nassert 'moextend_pl.export.modeling' not in sys.modules\nfolder = sys.argv[1]\n{load}"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


def test_configuration_says_nothing_of_where_the_model_lay(tiny_world: TinyWorld, tmp_path: Path) -> None:
    write_model(built(tiny_world.unbuilt(), ["projector"]), tmp_path)
    for file in tmp_path.glob("*.json"):
        assert str(tiny_world.root) not in file.read_text()
    assert isinstance(AutoConfig.from_pretrained(tmp_path).plans, list)
    assert json.loads((tmp_path / "generation_config.json").read_text())["do_sample"] is False
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        assert tensors.metadata()["format"] == "pt"
