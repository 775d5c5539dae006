"""Prompts -> answers with transformers' `generate`: where answers end, how long they may be, how tokens are drawn.

Shapes: B batch, S sequence, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moextend_pl.contracts import Batch, UserError
from moextend_pl.inference.spec import DEFAULT_NEW_TOKENS, GenerationSpec
from moextend_pl.inference.streaming import Pieces, cut
from moextend_pl.runs.sharded import any_sharded
from moextend_pl.samples.host_facts import tiles_by_row

BYTES_OF_CHARACTER = 4
"""At most, in UTF-8; a token may be a single byte."""

SEED_BYTES = 7
"""Of a digest that become a seed; torch takes 8, with a sign."""


def context_of(config: PreTrainedConfig) -> int | None:
    """Returns the longest sequence that a model was made for, in positions; None if it says none."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    stretched: list[Any] = [rope.get(name) for name in ("factor", "original_max_position_embeddings")]
    if all(isinstance(number, int | float) for number in stretched):
        return max(positions, int(stretched[0] * stretched[1]))
    return positions


def check_context(lengths: Sequence[int], names: Sequence[str], context: int | None) -> None:
    """Refuses prompts that leave no room for an answer.

    Args:
        lengths: Positions of each prompt, those of pictures included.
        names: What to call each.
        context: Longest sequence of the model; None for any.

    Raises:
        UserError: If one is as long as the context, or longer.
    """
    for length, name in zip(lengths, names, strict=True):
        if context is not None and length >= context:
            raise UserError(
                f"{name}: expected a prompt of fewer positions than the model's context, {context}, got {length}, "
                "pictures included. Ask less at once: a shorter text, fewer pictures, or fewer earlier turns."
            )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns every id at which an answer ends: those of the base's generation_config.json, and the tokenizer's."""
    config: Any = model.generation_config
    own = config.eos_token_id
    ids = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    return sorted(token for token in ids if token is not None)


def longest_answer(model: PreTrainedModel, spec: GenerationSpec) -> int:
    """Returns how many tokens an answer may have: the user's number, else the base's, else ours."""
    config: Any = model.generation_config
    return spec.max_new_tokens or config.max_new_tokens or DEFAULT_NEW_TOKENS


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    embed: Callable[[Batch], Tensor],
    spec: GenerationSpec,
    heard: Callable[[str], None] | None = None,
) -> list[str]:
    """Generates one answer for each prompt.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        batch: Prompts, padded on the left.
        embed: Returns the prompts as (B, S, D) embeddings.
        spec: How.
        heard: Is given the answer of a batch of one piece by piece, as it comes.

    Returns:
        B texts without special tokens.

    Raises:
        UserError: If a prompt is longer than the model's context, before anything is computed.
    """
    lengths, context = batch["attention_mask"].sum(dim=1).tolist(), context_of(model.config)
    check_context(lengths, batch["keys"], context)
    longest = longest_answer(model, spec)
    rooms = [longest if context is None else min(longest, context - length) for length in lengths]
    ends = end_tokens(model, tokenizer)
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    pieces = None if heard is None else Pieces(tokenizer, spec.stop, heard)
    tokens = model.generate(
        inputs_embeds=embed(batch),
        attention_mask=batch["attention_mask"],
        max_new_tokens=max(rooms),
        num_beams=spec.beams,
        eos_token_id=ends or None,
        pad_token_id=pad,
        logits_processor=draws(spec, batch),
        stopping_criteria=StoppingCriteriaList([EndsAtWords(tokenizer, spec.stop)] if spec.stop else []),
        streamer=pieces,
        # Not the base's own settings of draws: greedy unless the spec says otherwise, and then by `draws`.
        do_sample=False,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        num_return_sequences=1,
        return_dict_in_generate=False,
        # Ranks that compute layers together go on until the longest answer of them all.
        synced_gpus=any_sharded(model.parameters()) or None,
    )
    # A short prompt in the company of a long one must not be cut short by it, nor the long one go on beyond its end.
    kept = [row[:room] for row, room in zip(tokens, rooms, strict=True)]
    return [cut(text, spec.stop).strip() for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]


def draws(spec: GenerationSpec, batch: Batch) -> LogitsProcessorList:
    """Returns what turns logits into such whose maximum is a draw; nothing where nothing is drawn.

    Args:
        spec: How tokens are drawn.
        batch: The prompts, of which seeds are made.
    """
    if not spec.temperature:
        return LogitsProcessorList()
    chosen: list[LogitsProcessor] = [TemperatureLogitsWarper(spec.temperature)]
    if spec.top_k is not None:
        chosen.append(TopKLogitsWarper(spec.top_k))
    if spec.top_p < 1:
        chosen.append(TopPLogitsWarper(spec.top_p))
    if spec.seed is None:  # the same question asked twice is then drawn twice
        seeds = torch.randint(2**62, (len(batch["input_ids"]),), device="cpu").tolist()
    else:
        seeds = row_seeds(batch, spec.seed)
    return LogitsProcessorList([*chosen, SeededDraw(seeds)])


def row_seeds(batch: Batch, seed: int) -> list[int]:
    """Returns a seed for each prompt that depends on the prompt and a common seed, and on no other prompt.

    Args:
        batch: Prompts; images and sounds are known by their names, which are made of their content.
        seed: The common one.
    """
    ids_BS = batch["input_ids"].cpu()
    # Placeholders lie outside the vocabulary, so that theirs is the highest id.
    if "tiles" in batch:
        counts = (tiles_by_row(batch["tiles"].cpu()) > 0).sum(dim=1)
    else:
        highest = int(ids_BS.max()) - ("sounds" in batch)  # the highest but one where there are sounds
        counts = _counts(ids_BS == highest, len(batch["image_keys"]))
    heard = batch.get("sound_keys", [])
    sounds = _counts(ids_BS == ids_BS.max(), len(heard))
    names, tones = iter(batch["image_keys"]), iter(heard)
    seeds = []
    for ids, mask, *count in zip(ids_BS, batch["attention_mask"].cpu(), counts.tolist(), sounds.tolist(), strict=True):
        own = [next(names) for _ in range(count[0])] + [next(tones) for _ in range(count[1])]
        text = f"{seed} {ids[mask.bool()].tolist()} {own}"
        digest = hashlib.blake2b(text.encode(), digest_size=SEED_BYTES).digest()
        seeds.append(int.from_bytes(digest, "big"))
    return seeds


def _counts(is_placeholder_BS: Tensor, keys: int) -> Tensor:
    """Returns how many of a batch's images, or sounds, each row has, (B,)."""
    if not keys:
        return torch.zeros(len(is_placeholder_BS), dtype=torch.int64)
    return is_placeholder_BS.sum(dim=1) // max(int(is_placeholder_BS.sum()) // keys, 1)


class SeededDraw(LogitsProcessor):
    """Adds noise to logits so that their maximum is a draw from their softmax (Gumbel, 1954; arXiv 1411.0030).

    Each row has a generator of its own, on the CPU, so that a draw depends neither on other rows nor on the device.

    Args:
        seeds: B seeds.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns (B, V) logits with noise; minus infinity stays."""
        smallest = torch.finfo(torch.float32).tiny
        noise_BV = torch.stack(
            [
                torch.empty(scores.shape[-1], device="cpu").exponential_(generator=generator).clamp_min(smallest).log()
                for generator in self.generators
            ]
        )
        return scores.float() - noise_BV.to(scores.device)


class EndsAtWords(StoppingCriteria):
    """Ends an answer as soon as its text holds one of some words.

    transformers' own takes the vocabulary apart for minutes, and does not know tokenizers of whole words.

    Args:
        tokenizer: Turns tokens into text.
        stop: The words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.window = BYTES_OF_CHARACTER * max(map(len, stop)) + 16

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Returns (B,) True for each answer that holds one."""
        texts = self.tokenizer.batch_decode(input_ids[:, -self.window :], skip_special_tokens=True)
        held = [any(word in text for word in self.stop) for text in texts]
        return torch.tensor(held, device=input_ids.device)
