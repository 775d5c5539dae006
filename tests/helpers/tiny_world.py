"""A whole world of a few kilobytes: language model, vision tower and shards, made in a second."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.data_options import grouped
from PIL import Image
from torch import nn
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from datamodules.image_text import ImageTextShards
from datamodules.shards import Entry, conversation, write_shards
from datamodules.word_tokenizer import word_tokenizer
from moextend_pl.contracts import Batch, ExtensionPlan, LayerGrowth, Sample, TrainPlan, UpcycleSpec
from moextend_pl.models.base_model import ComputeSpec
from moextend_pl.models.delta import encoder_arguments, language_arguments
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.models.tower import FeatureSpec
from moextend_pl.samples.collate import collate_generation, collate_training
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.turns import Turn

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 230), "black": (10, 10, 10)}
QUESTION = "what is the color ?"
SIDE, LAYERS, EXPERTS, TOP_K, WIDTH = 32, 3, 4, 2, 32
SAMPLES, SHARD = 24, 8
GROWN = (0, 2)


def picture(number: int) -> bytes:
    """Returns a PNG in one of the colours, with a square whose place depends on the number."""
    colour = list(COLOURS.values())[number % len(COLOURS)]
    image = Image.new("RGB", (SIDE, SIDE), colour)
    image.paste((255, 255, 255), (number % 20, number * 7 % 20, number % 20 + 8, number * 7 % 20 + 8))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def colour_of(number: int) -> str:
    """Returns the name of the picture's colour."""
    return list(COLOURS)[number % len(COLOURS)]


def image_entry(number: int) -> Entry:
    """Returns a question about one picture."""
    turns = [
        (f"<image>\n{QUESTION}", colour_of(number)),
        (f"is it {colour_of(number + number % 2)} ?", ["no", "yes"][number % 2 == 0]),
    ]
    return Entry(f"i{number:03d}", conversation(*turns), (picture(number),))


def text_entry(number: int) -> Entry:
    """Returns a question about a described picture; lengths differ."""
    scene = "a small " * (number % 3) + f"picture is {colour_of(number)} ."
    return Entry(f"t{number:03d}", conversation((f"{scene} {QUESTION}", colour_of(number))))


def mixed_entry(number: int) -> Entry:
    """Returns a text sample for the first half of each four, else an image sample."""
    return text_entry(number) if number % 4 < 2 else image_entry(number)


ENTRIES = {"vqa": image_entry, "text": text_entry, "mixed": mixed_entry}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a word-level tokenizer of all texts of the tiny world."""
    entries = [make(number) for make in ENTRIES.values() for number in range(SAMPLES)]
    return word_tokenizer(turn["value"].replace("<image>", "") for e in entries for turn in e.conversations)


def tiny_config(vocab_size: int, **changes: Any) -> MixtralConfig:
    """Returns the configuration of a Mixtral of 3 layers with 4 experts; weights large enough to route by."""
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "router_jitter_noise": 0.0,
    }  # fmt: skip
    return MixtralConfig(vocab_size=vocab_size, **{**sizes, **changes})


def tiny_mixtral(vocab_size: int = 40, seed: int = 0, **changes: Any) -> MixtralForCausalLM:
    """Returns a random Mixtral in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixtralForCausalLM(tiny_config(vocab_size, **changes)).eval()


def make_plan(layers: Sequence[int] = GROWN, sources: Sequence[int] = (1,), **options: Any) -> ExtensionPlan:
    """Returns a plan that grows the layers from the same sources."""
    return ExtensionPlan(layers=tuple(LayerGrowth(layer, tuple(sources)) for layer in layers), **options)


def perturb(parameters: Sequence[nn.Parameter], size: float = 0.5, seed: int = 3) -> None:
    """Moves parameters at random, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@dataclass(frozen=True)
class TinyWorld:
    """Folders of the tiny world; read-only for tests.

    Attributes:
        root: Holds `base` (Mixtral and tokenizer), `dense` (Mistral and tokenizer), `encoder` (timm tower),
            `vit` (timm vision transformer) and `data/<set>/<split>`.
    """

    root: Path

    @property
    def base(self) -> Path:
        """Folder of the language model."""
        return self.root / "base"

    @property
    def encoder(self) -> Path:
        """Folder of the tower."""
        return self.root / "encoder"

    @property
    def dense(self) -> Path:
        """Folder of a language model without experts."""
        return self.root / "dense"

    @property
    def vit(self) -> Path:
        """Folder of a tower whose MLPs can be upcycled."""
        return self.root / "vit"

    def cumo(
        self,
        dense: bool = True,
        init_from: Path | None = None,
        scales: tuple[int, ...] = (1, 2),
        quantize: str | None = None,
        again: bool = False,
        **upcycle: UpcycleSpec,
    ) -> MoExtend:
        """Returns CuMo before its networks are built; `upcycle` holds specs by part."""
        base = {"base": str(self.dense), "dense": True} if dense else {"base": str(self.base)}
        return MoExtend(
            encoder=VisionEncoder(
                path=str(self.vit), features=FeatureSpec(scales=list(scales)), upcycle=upcycle.get("encoder")
            ),
            projector=Projector(kind="mlp2x_gelu", upcycle=upcycle.get("projector")),
            language=MoELanguageModel(**base, compute=ComputeSpec(quantize=quantize), upcycle=upcycle.get("language")),
            init_from=str(init_from) if init_from else None,
            activation_checkpointing=again,
        )

    def data(self, name: str, split: str = "train") -> str:
        """Returns the folder of a shard set: `vqa`, `text` or `mixed`."""
        return str(self.root / "data" / name / split)

    def language(self, plan: ExtensionPlan | None = None, **options: Any) -> MoELanguageModel:
        """Returns the language model, grown by the plan and built, in evaluation mode."""
        model = MoELanguageModel(base=str(self.base), **language_arguments(options))
        model.extension_plan = plan
        model.configure_model()
        return model.eval()

    def stock(self, implementation: str = "grouped_mm") -> MixtralForCausalLM:
        """Returns the language model as transformers alone loads it."""
        model = MixtralForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        model.set_experts_implementation(implementation)
        return model.eval()

    def unbuilt(self, init_from: Path | None = None, **options: Any) -> MoExtend:
        """Returns MoExtend before its networks are built."""
        return MoExtend(
            encoder=VisionEncoder(path=str(self.encoder)),
            projector=Projector(kind="mlp2x_gelu"),
            language=MoELanguageModel(base=str(self.base), **language_arguments(options)),
            init_from=str(init_from) if init_from else None,
        )

    def model(self, plan: ExtensionPlan | None = None, parts: Sequence[str] | None = None, **options: Any) -> MoExtend:
        """Returns MoExtend, grown, frozen but for the parts, and built, in evaluation mode."""
        model = self.unbuilt(**options)
        model.extension_plan = plan
        model.train_plan = None if parts is None else TrainPlan(tuple(parts))
        model.configure_model()
        return model.eval()

    def batch(self, model: MoExtend | MoELanguageModel, kinds: str, generation: bool = False, first: int = 0) -> Batch:
        """Returns a batch with one sample for each letter: `i` with a picture, `t` text only.

        Args:
            model: Tells what a sample looks like.
            kinds: For example `iti`.
            generation: Whether to return prompts, padded on the left.
            first: Number of the first sample.
        """
        samples = self.samples(model, kinds, generation, first)
        return collate_generation(samples, 0) if generation else collate_training(samples, 0)

    def samples(
        self, model: MoExtend | MoELanguageModel, kinds: str, generation: bool = False, first: int = 0
    ) -> list[Sample]:
        """Returns the samples of `batch`."""
        entries = [{"i": image_entry, "t": text_entry}[kind](first + n) for n, kind in enumerate(kinds)]
        spec = model.sample_spec()
        encoder = ConversationEncoder(spec)
        samples = []
        for entry in entries:
            values = [turn["value"] for turn in entry.conversations]
            turns = tuple(Turn(*pair) for pair in zip(values[::2], values[1::2], strict=True))
            pixels = [pixels_of(data, spec.image_size) for data in entry.images]
            encode = encoder.encode_prompt if generation else encoder.encode
            samples.append(encode(entry.key, turns[:1] if generation else turns, pixels, [entry.key] * len(pixels)))
        return samples

    def datamodule(self, train: str | None = "mixed", **options: Any) -> ImageTextShards:
        """Returns a datamodule over shard sets of this world; `val` is the test split of `vqa`."""
        settings: dict[str, Any] = {"batch_size": 4, "turns": "single", "val": self.data("vqa", "test"), **options}
        return ImageTextShards(**grouped(train=self.data(train) if train else None, **settings))


def pixels_of(data: bytes, side: int) -> torch.Tensor:
    """Decodes a picture to values in [-1, 1], (3, side, side)."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side))
    return (torch.tensor(list(image.tobytes())).reshape(side, side, 3).permute(2, 0, 1) / 255 - 0.5) / 0.5


def build_tiny_world(root: Path) -> TinyWorld:
    """Writes the world into an empty folder."""
    world = TinyWorld(root)
    tokenizer = tiny_tokenizer()
    model = tiny_mixtral(len(tokenizer))
    model.generation_config.max_new_tokens = 8  # a random model never comes to an end
    model.save_pretrained(world.base)
    tokenizer.save_pretrained(world.base)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = MistralConfig(vocab_size=len(tokenizer), **sizes, num_key_value_heads=2, head_dim=16, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MistralForCausalLM(dense).save_pretrained(world.dense)
    tokenizer.save_pretrained(world.dense)
    vit = {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    for folder, options in (
        (world.encoder, {"name": "timm/test_resnet", "layer": 2}),
        (world.vit, {"name": "timm/vit_tiny_patch16_224", "layer": -2, "tower_args": vit}),
    ):
        tower = VisionEncoder(**encoder_arguments({**options, "pool": 2}), image_size=SIDE)
        tower.init_seed = 5
        tower.configure_model()
        tower.save_pretrained(folder)
    for name, make in ENTRIES.items():
        for split, first in (("train", 0), ("test", SAMPLES)):
            folder = Path(world.data(name, split))
            folder.mkdir(parents=True)
            write_shards([make(number) for number in range(first, first + SAMPLES)], folder, SHARD)
    return world
