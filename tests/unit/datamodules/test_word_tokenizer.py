from __future__ import annotations

from transformers import AutoTokenizer

from datamodules.word_tokenizer import SPECIAL_TOKENS, word_tokenizer


def test_words_and_signs_are_tokens_and_case_is_dropped():
    tokenizer = word_tokenizer(["There is; a circle.", "IS it?"])
    found = tokenizer.convert_ids_to_tokens(tokenizer("Is there a square?", add_special_tokens=False)["input_ids"])
    assert found == ["is", "there", "a", "<unk>", "?"]
    assert len(tokenizer) == len(SPECIAL_TOKENS) + len({"there", "is", ";", "a", "circle", ".", "it", "?"})


def test_special_tokens_come_first_and_survive_inside_text():
    tokenizer = word_tokenizer(["a"])
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(6))
    assert tokenizer("<s>[INST] a [/INST] a</s>", add_special_tokens=False)["input_ids"] == [1, 4, 6, 5, 6, 2]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert "<image>" not in tokenizer.get_vocab()


def test_the_vocabulary_does_not_depend_on_the_order_of_texts():
    assert word_tokenizer(["b a", "c"]).get_vocab() == word_tokenizer(["c", "a b", "b"]).get_vocab()


def test_the_template_is_mixtral_like_and_survives_saving(tmp_path):
    word_tokenizer(["hello you"]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "you"},
        {"role": "user", "content": "hello you"},
    ]
    expected = "<s>[INST] hello [/INST] you</s>[INST] hello you [/INST]"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    assert tokenizer.decode(tokenizer("hello you")["input_ids"], skip_special_tokens=True) == "hello you"
