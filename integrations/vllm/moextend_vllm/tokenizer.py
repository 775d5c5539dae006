"""Texts to ids as in training: what stands between `<image>` marks is tokenised piece by piece."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import AutoConfig, BatchEncoding

from moextend_pl.samples.turns import IMAGE_MARK


def encode_pieces(encode: Any, text: str, mark_id: int, **options: Any) -> dict[str, list[Any]]:
    """Returns ids of a text, one id for each `<image>`, and what else a tokenizer was asked for.

    Args:
        encode: A tokenizer of transformers.
        text: As a chat template made it: its control tokens stand in it already, and none is added.
        mark_id: Id of a mark.
        options: Of the tokenizer; nothing is cut.
    """
    options |= {"add_special_tokens": False, "truncation": False, "max_length": None}
    found: dict[str, list[Any]] = {"input_ids": [], "attention_mask": []}
    if options.get("return_offsets_mapping"):
        found["offset_mapping"] = []
    start = 0
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            found["input_ids"].append(mark_id)
            if "offset_mapping" in found:
                found["offset_mapping"].append((start - len(IMAGE_MARK), start))
        if piece:
            encoded = encode(piece, **options)
            found["input_ids"] += encoded["input_ids"]
            if "offset_mapping" in found:
                found["offset_mapping"] += [(start + first, start + end) for first, end in encoded["offset_mapping"]]
        start += len(piece) + len(IMAGE_MARK)
    found["attention_mask"] = [1] * len(found["input_ids"])
    return found


def with_marks(tokenizer: Any, mark_id: int) -> Any:
    """Returns a copy of a tokenizer that gives each `<image>` an id outside the vocabulary.

    A mark for which no picture is given keeps that id, and vLLM refuses it.

    Args:
        tokenizer: Of transformers, as vLLM prepares it.
        mark_id: The id.
    """

    class Marked(tokenizer.__class__):
        def __call__(self, text: str | list[str], *_: Any, **options: Any) -> BatchEncoding:
            if isinstance(text, str):
                return BatchEncoding(encode_pieces(super().__call__, text, mark_id, **options))
            rows = [encode_pieces(super(Marked, self).__call__, one, mark_id, **options) for one in text]
            return BatchEncoding({name: [row[name] for row in rows] for name in rows[0]} if rows else {"input_ids": []})

        def encode(self, text: str, *_: Any, **options: Any) -> list[int]:
            ids: list[int] = self(text, **options)["input_ids"]
            return ids

        def num_special_tokens_to_add(self, pair: bool = False) -> int:
            return 0

        def __reduce__(self) -> tuple[Any, tuple[Any, int]]:
            return with_marks, (tokenizer, mark_id)

    marked = copy.copy(tokenizer)
    marked.__class__ = Marked
    return marked


class MarkTokenizer:
    """What vLLM's registry asks for a tokenizer."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, **options: Any) -> Any:
        """Reads the tokenizer of an exported folder.

        Args:
            folder: The folder, or its name in a hub.
            args: As vLLM gives them.
            options: As vLLM gives them.
        """
        from vllm.tokenizers.hf import CachedHfTokenizer

        wanted = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
        config = AutoConfig.from_pretrained(folder, **wanted)
        return with_marks(CachedHfTokenizer.from_pretrained(folder, *args, **options), config.image_token_id)
