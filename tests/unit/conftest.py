"""Small tokenizers, pictures and shard folders for the tests of the data room."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from datamodules.easy_vqa import build_easy_vqa
from datamodules.index import Shard
from datamodules.shards import Entry, conversation, write_shards
from datamodules.word_tokenizer import word_tokenizer
from moextend_pl.contracts import SampleSpec

WORDS = "what is the color of shape ? a blue red circle describe image . yes no there"

QWEN_LIKE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}"
)


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """Word-level, with a template like Mixtral's."""
    return word_tokenizer([WORDS])


@pytest.fixture(scope="session")
def pieces() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges across spaces and newlines, as Llama 3 and Qwen have it; no template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eot|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    texts = ["user\nwhat is this?", "assistant\nblue", "assistant\n\n\nred", "\n\n\nred", "a blue circle"] * 20
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eot|>")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Shard]]]:
    """The shard sets of easy-VQA, built once for all tests, and their indices."""
    out = tmp_path_factory.mktemp("easy") / "data"
    return out, build_easy_vqa(out)


@pytest.fixture
def spec(words: PreTrainedTokenizerFast) -> SampleSpec:
    """Four placeholders an image, id outside the vocabulary, 8 x 8 pixels."""
    return SampleSpec(words, len(words), tokens_per_image=4, image_size=8)


def _picture(colour: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (colour % 256, colour // 256, 7)).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """Makes the bytes of an image of one colour."""
    return _picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven samples in shards of four: sample i has i % 3 images and 1 + i % 2 turns."""
    out = tmp_path / "set"
    out.mkdir()
    write_shards((sample_entry(number) for number in range(11)), out, samples_per_shard=4)
    return out


def sample_entry(number: int) -> Entry:
    """The sample of a number; every picture of all samples differs."""
    images = tuple(_picture(10 * number + i) for i in range(number % 3))
    turns = [("<image>\n" * len(images) + "what is the color ?", "blue"), ("is there a circle ?", "no")]
    return Entry(f"s{number:02d}", conversation(*turns[: 1 + number % 2]), images)


@pytest.fixture
def entry() -> Callable[[int], Entry]:
    """Gives the sample of a number, as it went into `folder`."""
    return sample_entry


@pytest.fixture
def pixels() -> Callable[[int], list[torch.Tensor]]:
    """Makes n images of 8 x 8 that differ."""
    return lambda count: [torch.full((3, 8, 8), float(number)) for number in range(count)]


@pytest.fixture
def templates() -> dict[str, str]:
    """Chat templates of other families."""
    return {"qwen": QWEN_LIKE, "llama": LLAMA_LIKE}


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a trainer whose run directory is `tmp_path/run`."""

    def make(*callbacks: Callback, steps: int = 4, **options: Any) -> Trainer:
        settings: dict[str, Any] = {
            "default_root_dir": tmp_path / "run", "max_steps": steps, "max_epochs": -1, "accelerator": "cpu",
            "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None, "val_check_interval": steps, "limit_val_batches": 1,
        }  # fmt: skip
        return Trainer(callbacks=list(callbacks), **{**settings, **options})

    return make
