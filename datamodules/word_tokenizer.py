"""A word-level tokenizer with a chat template, small enough to come with its data set."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moextend_pl.samples.templates import INST

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "[INST]", "[/INST]")


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Builds a tokenizer that knows every lower-cased word and sign of some texts.

    Ids follow the special tokens and then the alphabet, so the same words give the same tokenizer
    whatever their order. There is no token for images: their id is the vocabulary's size.
    """
    normalizer = normalizers.Lowercase()
    splitter = pre_tokenizers.Whitespace()
    words: set[str] = set()
    for text in set(texts):
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[INST]", "[/INST]"],
        chat_template=INST,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
