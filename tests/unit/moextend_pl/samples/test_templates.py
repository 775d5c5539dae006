"""Label masks follow from the chat template: Mixtral's, Qwen's and Llama's, marked or not."""

from __future__ import annotations

import copy

import pytest
import torch

from moextend_pl.contracts import IGNORE_INDEX, SampleSpec, UserError
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.templates import INST, load_tokenizer
from moextend_pl.samples.turns import Turn

MIXTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% if messages[0]['role'] == 'system' %}<|im_start|>system\n{{ messages[0]['content'] }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|im_start|>' + message['role'] + '<|im_end|>\n\n' + message['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"
)
# Hides the thoughts of all answers but the last, and says itself what is learned.
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{% if not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS = {"mixtral": "<|eot|>", "inst": "<|eot|>", "chatml": "<|im_end|>\n", "llama": "<|eot|>"}
TEMPLATES = {"mixtral": MIXTRAL, "inst": INST, "chatml": CHATML, "llama": LLAMA}
ASK = (Turn("<image>\nwhat is this?", "a blue circle"), Turn("is it  red?", "no"), Turn("why?", "blue\nblue"))


def encoder_for(pieces, template, **options):
    tokenizer = copy.deepcopy(pieces)
    tokenizer.chat_template = template
    return ConversationEncoder(SampleSpec(tokenizer, len(tokenizer), tokens_per_image=4, image_size=8), **options)


def learned_runs(pieces, sample):
    """The text of each unbroken run of learned tokens."""
    runs, open_run = [], False
    for label in sample.labels.tolist():
        if label != IGNORE_INDEX:
            runs = [*runs[:-1], [*runs[-1], label]] if open_run else [*runs, [label]]
        open_run = label != IGNORE_INDEX
    return [pieces.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learned_is_each_answer_with_its_end_token(name, pieces, pixels):
    sample = encoder_for(pieces, TEMPLATES[name]).encode("k", ASK, pixels(1), ["n"])
    space = " " if name == "inst" else ""
    assert learned_runs(pieces, sample) == [f"{space}{turn.gpt}{ENDS[name]}" for turn in ASK]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_prompt_of_generation_is_the_start_of_what_was_trained(name, pieces, pixels):
    encoder = encoder_for(pieces, TEMPLATES[name])
    for turns in (ASK, ASK[:2], ASK[:1]):
        trained = encoder.encode("k", turns, pixels(1), ["n"])
        prompt = encoder.encode_prompt("k", turns, pixels(1), ["n"]).input_ids
        assert torch.equal(trained.input_ids[: len(prompt)], prompt)
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in (("user", turn.human), ("assistant", turn.gpt))
        ]
        chat = encoder.spec.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        text = pieces.decode([token for token in prompt.tolist() if token != encoder.spec.image_token_id])
        assert text == chat.replace("<image>", "")


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("inst", "<|bos|>[INST] Be brief.\n\nwhat is this? [/INST] a blue"),
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhat is this?"),
        ("llama", "<|bos|><|im_start|>system<|im_end|>\n\nBe brief.<|eot|><|im_start|>user<|im_end|>\n\nwhat is this?"),
    ],
)
def test_a_system_text_stands_before_the_first_question_and_is_not_learned(name, start, pieces):
    turns = (Turn("what is this?", "a blue circle", "Be brief."), Turn("why?", "no"))
    sample = encoder_for(pieces, TEMPLATES[name]).encode("k", turns, [], [])
    text = pieces.decode(sample.input_ids)
    assert text.startswith(start)
    assert text.count("Be brief.") == 1
    assert "brief" not in "".join(learned_runs(pieces, sample))


def test_a_template_without_a_place_for_system_texts_is_refused(pieces):
    with pytest.raises(UserError, match=r"roles must alternate.*`chat_template`"):
        encoder_for(pieces, MIXTRAL).encode("k", (Turn("what?", "red", "Be brief."),), [], [])


def test_a_template_that_marks_its_answers_may_change_earlier_turns(pieces):
    turns = (Turn("what is this?", "hm</think>a circle"), Turn("why?", "so</think>blue"))
    encoder = encoder_for(pieces, MARKED)
    sample = encoder.encode("k", turns, [], [])
    assert learned_runs(pieces, sample) == ["a circle<|im_end|>", "so</think>blue<|im_end|>"]
    prompt = encoder.encode_prompt("k", turns, [], []).input_ids
    assert torch.equal(sample.input_ids[: len(prompt)], prompt)


def test_a_marked_template_whose_prompt_is_another_than_its_generation_prompt_is_refused(pieces):
    wrong = MARKED.replace(
        "{% if add_generation_prompt %}<|im_start|>assistant", "{% if add_generation_prompt %}<|im_start|>x"
    )
    with pytest.raises(UserError, match="at turn 0 of 1"):
        encoder_for(pieces, wrong).encode("k", ASK[1:2], [], [])
    unmarked = MARKED.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endif %}"
    )
    with pytest.raises(UserError, match="at turn 1 of 2"):
        encoder_for(pieces, unmarked).encode("k", ASK[1:], [], [])


def test_a_tokenizer_without_a_template_is_refused_by_the_name_of_the_option(pieces):
    with pytest.raises(UserError, match="`chat_template` of the language model to `inst`"):
        encoder_for(pieces, None)


def test_the_option_names_ours_a_file_or_the_tokenizers_own(tmp_path, pieces):
    pieces = copy.deepcopy(pieces)
    pieces.chat_template = CHATML
    pieces.save_pretrained(tmp_path / "words")
    (tmp_path / "own.jinja").write_text(LLAMA)
    assert load_tokenizer(tmp_path / "words").chat_template == CHATML
    assert load_tokenizer(tmp_path / "words", "inst").chat_template == INST
    assert load_tokenizer(tmp_path / "words", str(tmp_path / "own.jinja")).chat_template == LLAMA
    with pytest.raises(UserError, match=r"\['inst'\], a file.*'llama'"):
        load_tokenizer(tmp_path / "words", "llama")
    with pytest.raises(UserError, match="tokenizer folder"):
        load_tokenizer(tmp_path / "none")
    for content in ("{", "{}"):
        (tmp_path / "words/tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"that transformers can load at .*words"):
            load_tokenizer(tmp_path / "words")
