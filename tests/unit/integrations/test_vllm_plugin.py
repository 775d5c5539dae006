"""What the vLLM plug-in says to the engine is right; the engine itself is run by `integrations/vllm/tests`."""

from __future__ import annotations

import configparser
import copy
import io
import pickle
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_world import QUESTION, TinyWorld, make_plan, perturb, picture
from moextend_vllm import ARCHITECTURE, TOKENIZER_MODE
from moextend_vllm.network import MoExtendModel, file_names
from moextend_vllm.places import FLAG, marked_places, read_places
from moextend_vllm.start import StartUp
from moextend_vllm.tokenizer import with_marks
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from moextend_pl.contracts import TrainPlan, UserError
from moextend_pl.export.folder import write_model

PARTS = ("projector", "new_experts", "new_routers", "calibration")
PICTURE = Image.open(io.BytesIO(picture(3)))
PACKAGE = Path(__file__).parents[3] / "integrations" / "vllm"


@pytest.fixture(scope="module")
def exported(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_world.unbuilt()
    model.extension_plan, model.train_plan = make_plan(), TrainPlan(PARTS)
    model.configure_model()
    perturb([parameter for name in PARTS for parameter in model.parts()[name]], 0.2)
    folder = tmp_path_factory.mktemp("exported")
    write_model(model.requires_grad_(False).eval(), folder)
    return folder


def engine_pass(requests: list[tuple[torch.Tensor, int]], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns positions of all tokens as vLLM lays them flat, and those that they should be without flags."""
    rows, plain = [], []
    for (places_3S, after), length in zip(requests, lengths, strict=True):
        prompt = places_3S.shape[1]
        rows += [places_3S[0, :length], torch.arange(prompt, length) + after]  # as vLLM goes on behind a prompt
        plain.append(torch.arange(length))
    return torch.cat(rows), torch.cat(plain)


@pytest.mark.parametrize("routing", ["open", "masked", "masked_tokens"])
def test_every_token_of_a_flat_pass_says_which_new_experts_it_may_reach(routing: str) -> None:
    plans = [make_plan(routing=routing, task="a"), make_plan(routing="masked_tokens"), make_plan(task="b")]
    images = [torch.tensor([0, 1, 1, 0, 0]), torch.zeros(4), torch.tensor([1, 0, 0])]
    lengths = [7, 6, 3]
    requests = [marked_places(plans, "a", image.bool()) for image in images]
    flat_T, plain_T = engine_pass(requests, lengths)
    places_T, masks_T = read_places(flat_T, len(plans))
    assert torch.equal(places_T, plain_T)
    expected: list[list[bool]] = [[], [], []]
    for image, length in zip(images, lengths, strict=True):
        for token in range(length):
            on_picture = token < len(image) and bool(image[token])
            seen = bool(image.any())
            expected[0].append({"open": True, "masked": seen, "masked_tokens": on_picture}[routing])
            expected[1].append(on_picture)
            expected[2].append(False)  # an extension for another task
    assert [mask_T.tolist() for mask_T in masks_T] == expected


def test_folder_holds_all_weights_of_the_network_and_no_others(exported: Path) -> None:
    whole = AutoModelForImageTextToText.from_pretrained(exported)
    with torch.device("meta"):
        network = MoExtendModel(whole.config)
    renamed = set()
    with safe_open(exported / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            old, new = next(pair for pair in file_names(network).items() if name.startswith(pair[0]))
            renamed.add(new + name.removeprefix(old))
    assert renamed == {f"model.{name}" for name in network.state_dict()} | {"lm_head.weight"}


@torch.no_grad()
def test_network_computes_what_the_exported_model_does_and_masks_matter(exported: Path) -> None:
    whole = AutoModelForImageTextToText.from_pretrained(exported).eval()
    network = MoExtendModel(copy.deepcopy(whole.config)).eval()
    head = {
        name.replace(f"language_model.{network.decoder_name}.", "language_model."): t
        for name, t in whole.state_dict().items()
    }
    network.load_state_dict({name: head[name] for name in network.state_dict()})
    processor = AutoProcessor.from_pretrained(exported)
    parts = [{"type": "image", "image": PICTURE}, {"type": "text", "text": QUESTION}]
    asked = [
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for content in (QUESTION, parts)
    ]
    plans = [plan for plan, _ in network.extensions]
    for inputs in asked:
        logits_SV = whole.language_model.lm_head(_hidden(network, plans, inputs))
        torch.testing.assert_close(logits_SV, whole(**inputs).logits[0], rtol=1e-4, atol=1e-5)
    shut = [make_plan(task="another")]
    apart = _hidden(network, shut, asked[1]) - _hidden(network, plans, asked[1])
    assert apart.abs().max() > 0.01


def _hidden(network: MoExtendModel, plans: list[Any], inputs: Any) -> torch.Tensor:
    is_image_S = inputs["input_ids"][0].eq(network.config.image_token_id)
    places_3S, _ = marked_places(plans, "", is_image_S)
    places_S, masks_S = read_places(places_3S[0], len(plans))
    embeddings = network.embed(inputs["input_ids"], inputs.get("pixel_values"))
    network.declare(masks_S)
    hidden_SD: torch.Tensor = network(inputs_embeds=embeddings, position_ids=places_S[None])[0][0]
    return hidden_SD


def test_ids_are_those_of_the_processor_and_a_mark_without_picture_is_outside_the_vocabulary(exported: Path) -> None:
    processor = AutoProcessor.from_pretrained(exported)
    mark = processor.image_token_id
    tokenizer = pickle.loads(pickle.dumps(copy.deepcopy(with_marks(processor.tokenizer, mark))))
    text = f"<s> [INST] <image>\n<image>\n{QUESTION} is it red ? [/INST]"
    expected = processor(images=[PICTURE] * 2, text=text)["input_ids"][0]
    found = tokenizer(text, return_offsets_mapping=True)
    placed = [
        one for token in found["input_ids"] for one in [token] * (processor.tokens_per_image if token == mark else 1)
    ]
    assert placed == expected
    assert tokenizer.encode(text) == found["input_ids"] == tokenizer([text])["input_ids"][0]
    assert len(found["offset_mapping"]) == len(found["attention_mask"]) == len(found["input_ids"])
    pairs = [(text[start:end], token) for (start, end), token in zip(found["offset_mapping"], found["input_ids"])]
    assert [piece for piece, token in pairs if token == mark] == ["<image>"] * 2
    assert ("color", tokenizer.convert_tokens_to_ids("color")) in pairs
    assert mark > max(tokenizer.get_vocab().values())


def options(**changes: Any) -> Any:
    config = SimpleNamespace(plans=[make_plan(**changes.pop("plan", {})).to_dict()], task=changes.pop("task", ""))
    model = {
        "hf_config": config,
        "max_model_len": 64,
        "quantization": None,
        "tokenizer_mode": "auto",
        "enforce_eager": False,
    }
    rest = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "speculative_config": None, "lora_config": None}
    for name in (*model, *rest):
        group = model if name in model else rest
        group[name] = changes.pop(name, group[name])
    assert not changes
    parallel = SimpleNamespace(**{name: rest.pop(name) for name in ("tensor_parallel_size", "pipeline_parallel_size")})
    cache = SimpleNamespace(enable_prefix_caching=True)
    return SimpleNamespace(model_config=SimpleNamespace(**model), parallel_config=parallel, cache_config=cache, **rest)


def settle(given: Any) -> Any:
    StartUp.verify_and_update_model_config(given.model_config)
    StartUp.verify_and_update_config(given)
    return given


@pytest.mark.parametrize(("routing", "kept"), [("masked", False), ("masked_tokens", True), ("open", True)])
def test_prefixes_are_shared_only_where_no_later_picture_changes_them(routing: str, kept: bool) -> None:
    settled = settle(options(plan={"routing": routing}))
    assert settled.cache_config.enable_prefix_caching is kept
    assert settled.model_config.enforce_eager
    assert settled.model_config.tokenizer_mode == TOKENIZER_MODE
    assert settled.model_config.hf_config.mrope_section


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tensor_parallel_size": 2}, "one device"),
        ({"pipeline_parallel_size": 2}, "one device"),
        ({"quantization": "fp8"}, "--quantization fp8"),
        ({"speculative_config": "given"}, "speculative"),
        ({"lora_config": "given"}, "LoRA"),
        ({"max_model_len": FLAG}, "--max-model-len"),
        ({"plan": {"task": "first"}}, "task"),
    ],
    ids=str,
)
def test_options_under_which_answers_would_be_wrong_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, UserError), match=said):
        settle(options(**given))


def test_more_extensions_than_flags_are_refused() -> None:
    given = options()
    given.model_config.hf_config.plans *= 7
    with pytest.raises(ValueError, match="at most 6 times, got 7"):
        settle(given)


class Registry:
    def __init__(self) -> None:
        self.entries: dict[str, tuple[str, ...]] = {}

    def register(self, name: str, *target: str) -> None:
        self.entries[name] = target

    register_model = register


def test_entry_point_registers_model_tokenizer_and_start_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {}
    lists = {"ModelRegistry": Registry(), "RENDERER_REGISTRY": Registry(), "TokenizerRegistry": Registry()}
    for name in (
        "vllm",
        "vllm.model_executor",
        "vllm.model_executor.models",
        "vllm.model_executor.models.config",
        "vllm.renderers",
        "vllm.renderers.registry",
        "vllm.tokenizers",
        "vllm.tokenizers.registry",
    ):
        module = ModuleType(name)
        vars(module).update(lists, MODELS_CONFIG_MAP=known)
        monkeypatch.setitem(sys.modules, name, module)
    parser = configparser.ConfigParser()
    parser.read(PACKAGE / "setup.cfg")
    _, target = parser["options.entry_points"]["vllm.general_plugins"].split("=")
    module_name, function = target.strip().split(":")
    for _ in range(2):
        getattr(import_module(module_name), function)()
    assert known == {ARCHITECTURE: StartUp}
    assert lists["ModelRegistry"].entries == {ARCHITECTURE: ("moextend_vllm.model:MoExtendForVllm",)}
    assert lists["TokenizerRegistry"].entries == {TOKENIZER_MODE: ("moextend_vllm.tokenizer", "MarkTokenizer")}
    assert list(lists["RENDERER_REGISTRY"].entries) == [TOKENIZER_MODE]


def test_architecture_is_the_one_that_folders_name(exported: Path) -> None:
    assert AutoModelForImageTextToText.from_pretrained(exported).config.architectures == [ARCHITECTURE]
