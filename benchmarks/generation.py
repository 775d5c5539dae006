"""How many tokens a second are generated: with a cache and without, one question at a time and sixteen together?

    python benchmarks/generation.py --dtype fp32 --rounds 2 --clock cpu
    python benchmarks/generation.py --quick

A random Mixtral, half of its layers extended, open routing, greedy, as `MoELanguageModel.answer` generates; without a
cache all logits are computed again for every token. The static cache of transformers is timed on the same model.
Answers are compared token by token; prompts are read in the time that is measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import DTYPES, Row, finish, interleaved, parse

from datamodules.word_tokenizer import word_tokenizer
from moextend_pl.contracts import Batch, ExtensionPlan, LayerGrowth
from moextend_pl.inference.spec import GenerationSpec
from moextend_pl.models.language import MoELanguageModel

TOGETHER, ALONE = 16, 2
SINGLY, UNCACHED, WHOLE, STATIC = "one at a time", "one at a time, no cache", "16 together", "16, static cache"


@dataclass(frozen=True)
class Size:
    """Sizes of model, prompt and answer."""

    layers: int = 4
    width: int = 512
    inner: int = 1024
    experts: int = 8
    vocabulary: int = 4096
    prompt: int = 128
    answer: int = 128


def language_model(size: Size, dtype: torch.dtype) -> MoELanguageModel:
    """Builds a language model whose upper half is extended and whose answers never end by themselves."""
    config: dict[str, Any] = {
        "model_type": "mixtral", "vocab_size": size.vocabulary, "hidden_size": size.width,
        "intermediate_size": size.inner, "num_hidden_layers": size.layers, "num_attention_heads": 8,
        "num_key_value_heads": 4, "num_local_experts": size.experts, "num_experts_per_tok": 2,
        "max_position_embeddings": 4096, "initializer_range": 0.05,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        word_tokenizer(["a word"]).save_pretrained(folder)
        model = MoELanguageModel(base=config, tokenizer=folder, generation=GenerationSpec(size.answer))
        layers = range(size.layers // 2, size.layers)
        plan = ExtensionPlan(tuple(LayerGrowth(layer, (1,)) for layer in layers), init="copy", routing="open")
        model.extension_plan = plan
        model.configure_model()
        assert model.image_token_id == size.vocabulary  # reads the tokenizer while it is there
    model.tokenizer.eos_token = None
    settings: Any = model.model.generation_config
    settings.eos_token_id = None
    return model.to(dtype).eval()


def prompts(size: Size, rows: int) -> Batch:
    """Returns random prompts; their lengths differ by a quarter, with padding on the left."""
    generator = torch.Generator("cpu").manual_seed(1)
    ids = torch.randint(8, size.vocabulary, (rows, size.prompt), generator=generator, device="cpu")
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : row * size.prompt // (4 * rows)] = 0
    return {
        "keys": [str(n) for n in range(rows)], "input_ids": ids * mask, "labels": torch.full_like(ids, -100),
        "attention_mask": mask, "pixel_values": torch.empty(0), "image_keys": [],
    }  # fmt: skip


@torch.no_grad()
def without_cache(model: MoELanguageModel, batch: Batch, steps: int) -> list[int]:
    """Chooses token after token of one prompt by the logits of the whole text."""
    ids = batch["input_ids"]
    for _ in range(steps):
        logits = model({**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
        ids = torch.cat([ids, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[0, batch["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def tokens(model: MoELanguageModel, batch: Batch, steps: int, **options: Any) -> list[list[int]]:
    """Generates with transformers alone."""
    model.set_reach(batch)
    generate: Any = model.model
    found = generate.generate(
        inputs_embeds=model.embed(batch["input_ids"]), attention_mask=batch["attention_mask"], do_sample=False,
        max_new_tokens=steps, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    model.close_reach()
    rows: list[list[int]] = found.tolist()
    return rows


def compare(size: Size, dtype: str, options: argparse.Namespace) -> list[Row]:
    """Times all ways; `tokens_per_s` counts what is generated, `same_tokens` compares with the first prompts alone."""
    model, many = language_model(size, DTYPES[dtype]), prompts(size, TOGETHER)
    alone = [row_of(many, row) for row in range(ALONE)]
    found: dict[str, list[list[int]]] = {}

    def keep(way: str, rows: list[list[int]]) -> None:
        found[way] = rows

    ways: dict[str, Callable[[], object]] = {
        SINGLY: lambda: keep(SINGLY, [tokens(model, one, size.answer)[0] for one in alone]),
        UNCACHED: lambda: keep(UNCACHED, [without_cache(model, alone[0], size.answer)]),
        WHOLE: lambda: keep(WHOLE, tokens(model, many, size.answer)),
        STATIC: lambda: keep(STATIC, tokens(model, many, size.answer, cache_implementation="static")),
    }
    counts = dict(zip(ways, (ALONE, 1, TOGETHER, TOGETHER), strict=True))
    times = interleaved(ways, options)
    speeds = {name: counts[name] * size.answer / times[name]["median_ms"] * 1e3 for name in ways}
    return [
        {
            "dtype": dtype, "way": name, **times[name], "tokens_per_s": round(speeds[name], 1),
            "speed": round(speeds[name] / speeds[SINGLY], 3),
            "same_tokens": found[name][:ALONE] == found[SINGLY][: len(found[name])],
        }
        for name in ways
    ]  # fmt: skip


def row_of(batch: Batch, row: int) -> Batch:
    """Returns one prompt of a batch without its padding."""
    kept = batch["attention_mask"][row].bool()
    names = ("input_ids", "attention_mask", "labels")
    alone = {name: batch[name][row : row + 1, kept] for name in names}  # type: ignore[literal-required]
    return {**batch, "keys": [str(row)], **alone}  # type: ignore[typeddict-item]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one table and returns the exit code."""
    options = parse(__doc__.splitlines()[0], argv)
    size = Size(layers=2, width=32, inner=32, vocabulary=64, prompt=16, answer=8) if options.quick else Size()
    rows = [row for dtype in options.dtype for row in compare(size, dtype, options)]
    return finish(__doc__.splitlines()[0], {f"answers of {size}": rows}, options)


if __name__ == "__main__":
    sys.exit(main())
