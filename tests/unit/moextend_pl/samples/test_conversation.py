from __future__ import annotations

import copy
import pickle

import pytest
import torch

from moextend_pl.contracts import IGNORE_INDEX, SampleSpec, UserError
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.turns import Turn

X = IGNORE_INDEX
ASK = (Turn("<image>\nwhat color ?", "a blue circle"), Turn("is there a circle ?", "yes"))


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return SampleSpec(tokenizer, len(tokenizer), tokens_per_image=4, image_size=8)


def ids_of(tokenizer, text):
    return [tokenizer.convert_tokens_to_ids(word) for word in text.split()]


def test_ids_and_labels_of_a_conversation_are_those_written_by_hand(spec, words, pixels):
    sample = ConversationEncoder(spec).encode("k", ASK, pixels(1), ["n"])
    image = [len(words)] * 4
    expected = [
        (ids_of(words, "<s> [INST]"), False),
        (image, False),
        (ids_of(words, "what color ? [/INST]"), False),
        (ids_of(words, "a blue circle </s>"), True),
        (ids_of(words, "[INST] is there a circle ? [/INST]"), False),
        (ids_of(words, "yes </s>"), True),
    ]
    assert sample.input_ids.tolist() == [token for part, _ in expected for token in part]
    assert sample.labels.tolist() == [token if learned else X for part, learned in expected for token in part]
    assert words.unk_token_id not in sample.input_ids.tolist()
    assert (sample.key, sample.image_keys, sample.pixel_values.shape) == ("k", ["n"], (1, 3, 8, 8))


def test_a_prompt_is_what_is_left_of_the_last_answer(spec, words, pixels):
    encoder = ConversationEncoder(spec)
    whole = encoder.encode("k", ASK, pixels(1), ["n"]).input_ids.tolist()
    sample = encoder.encode_prompt("k", ASK, pixels(1), ["n"])
    assert sample.input_ids.tolist() == whole[:-2]
    assert set(sample.labels.tolist()) == {X}
    assert (sample.prompt, sample.answer) == ("is there a circle ?", "yes")
    first = encoder.encode_prompt("k", ASK[:1], pixels(1), ["n"])
    assert (first.prompt, first.answer) == ("what color ?", "a blue circle")


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_the_learned_text_of_other_families_is_answer_and_end_token(family, pieces, templates, pixels):
    spec = with_template(pieces, templates[family])
    sample = ConversationEncoder(spec).encode("k", ASK, pixels(1), ["n"])
    learned = [label for label in sample.labels.tolist() if label != X]
    end = "<|im_end|>\n" if family == "qwen" else "<|eot|>"
    assert pieces.decode(learned) == f"a blue circle{end}yes{end}"
    text = pieces.decode([token for token in sample.input_ids.tolist() if token != spec.image_token_id])
    messages = [
        {"role": role, "content": value}
        for turn in ASK
        for role, value in (("user", turn.human), ("assistant", turn.gpt))
    ]
    rendered = spec.tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == rendered.replace("<image>", "")
    assert text.count("<|bos|>") == (family == "llama")  # the template's own; none is added


@pytest.mark.parametrize("answer", ["red", "\n\n\nred", "\nred", " red"])
def test_training_and_generation_see_the_same_prompt_even_where_merges_cross_its_end(answer, pieces, templates):
    for template in (templates["qwen"], templates["qwen"].replace("| trim", "")):
        encoder = ConversationEncoder(with_template(pieces, template))
        turns = (Turn("what is this?", answer),)
        prompt = encoder.encode_prompt("k", turns, [], []).input_ids.tolist()
        sample = encoder.encode("k", turns, [], [])
        assert sample.input_ids.tolist()[: len(prompt)] == prompt
        assert sample.labels.tolist() == [X] * len(prompt) + sample.input_ids.tolist()[len(prompt) :]
        assert pieces.decode(sample.input_ids[len(prompt) :]) == answer + "<|im_end|>\n"


def test_a_merge_across_the_border_does_exist_in_this_tokenizer(pieces):
    joined = pieces("assistant\n" + "\n\nred", add_special_tokens=False)["input_ids"]
    apart = [
        token for part in ("assistant\n", "\n\nred") for token in pieces(part, add_special_tokens=False)["input_ids"]
    ]
    assert joined != apart


def test_text_away_from_borders_is_tokenised_as_a_whole(pieces, templates):
    spec = with_template(pieces, templates["llama"])
    sample = ConversationEncoder(spec).encode("k", (Turn("what is this?", "a blue circle"),), [], [])
    text = "<|bos|><|im_start|>user<|im_end|>\n\nwhat is this?<|eot|>"
    text += "<|im_start|>assistant<|im_end|>\n\na blue circle<|eot|>"
    assert sample.input_ids.tolist() == pieces(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_cannot_tell_offsets_gives_the_same_mask(spec, words, pixels):
    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(words, name)

        def __call__(self, text, add_special_tokens):
            return words(text, add_special_tokens=add_special_tokens)

    slow = SampleSpec(Slow(), len(words), 4, 8)
    fast_sample, slow_sample = (ConversationEncoder(s).encode("k", ASK, pixels(1), ["n"]) for s in (spec, slow))
    assert torch.equal(fast_sample.input_ids, slow_sample.input_ids)
    assert torch.equal(fast_sample.labels, slow_sample.labels)


def test_a_template_that_hides_earlier_thoughts_is_refused_with_the_way_out(pieces, templates):
    hiding = templates["qwen"].replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}",
    )
    encoder = ConversationEncoder(with_template(pieces, hiding))
    with pytest.raises(UserError, match=r'at turn 1 of 2 .*turns: "single"'):
        encoder.encode("k", (Turn("a", "b"), Turn("c", "d")), [], [])
    encoder.encode("k", (Turn("a", "b"),), [], [])


def test_a_template_whose_generation_prompt_is_not_the_start_of_its_answers_is_refused(pieces, templates):
    thinking = templates["qwen"].replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}"
    )
    with pytest.raises(UserError, match="at turn 0 of 1"):
        ConversationEncoder(with_template(pieces, thinking)).encode("k", (Turn("a", "b"),), [], [])


def test_unusable_templates_are_refused(pieces):
    with pytest.raises(UserError, match="chat template"):
        ConversationEncoder(SampleSpec(pieces, 999, 4, 8))
    raising = with_template(pieces, "{{ raise_exception('system only') }}")
    with pytest.raises(UserError, match="system only"):
        ConversationEncoder(raising).encode("k", ASK[1:], [], [])
    dropping = with_template(pieces, "{% for m in messages %}{{ m['content'].replace('<image>', '') }}|{% endfor %}")
    with pytest.raises(UserError, match="keeps every `<image>`"):
        ConversationEncoder(dropping).encode("k", ASK, [], [])


def test_truncation_cuts_text_anywhere_but_never_an_image(spec, words, pixels):
    turns = (
        Turn("<image> what ?", "a blue circle"),
        Turn("<image> what color ?", "blue red"),
    )
    whole = ConversationEncoder(spec).encode("k", turns, pixels(2), ["m", "n"])
    first_answer = whole.labels.ne(X).nonzero()[0].item()
    second_image = [i for i, token in enumerate(whole.input_ids.tolist()) if token == len(words)][4]
    for limit in range(1, len(whole.input_ids) + 3):
        encoder = ConversationEncoder(spec, limit)
        if limit <= first_answer:
            with pytest.raises(UserError, match=f"'k'.*max_length={limit}"):
                encoder.encode("k", turns, pixels(2), ["m", "n"])
            continue
        sample = encoder.encode("k", turns, pixels(2), ["m", "n"])
        length = second_image if second_image < limit < second_image + 4 else min(limit, len(whole.input_ids))
        assert sample.input_ids.tolist() == whole.input_ids.tolist()[:length]
        assert sample.labels.tolist() == whole.labels.tolist()[:length]
        placeholders = sample.input_ids.eq(len(words)).sum().item()
        assert placeholders == 4 * len(sample.pixel_values) == 4 * len(sample.image_keys)
        assert sample.image_keys == ["m", "n"][: len(sample.pixel_values)]


def test_a_prompt_is_never_cut(spec, pixels):
    with pytest.raises(UserError, match=r"'k'.*prompt of at most `max_length=9`"):
        ConversationEncoder(spec, 9).encode_prompt("k", ASK, pixels(1), ["n"])
    with pytest.raises(UserError, match="max_length"):
        ConversationEncoder(spec, 0)


def test_the_cache_changes_nothing_and_cannot_be_spoilt(spec, pixels):
    encoder = ConversationEncoder(spec)
    first = encoder.encode("k", ASK, pixels(1), ["n"])
    kept = first.input_ids.clone(), first.labels.clone()
    first.input_ids.zero_()
    first.labels.zero_()
    again = encoder.encode("other", ASK, pixels(1), ["m"])
    assert torch.equal(again.input_ids, kept[0])
    assert torch.equal(again.labels, kept[1])
    assert (again.key, again.image_keys) == ("other", ["m"])


def test_an_encoder_can_be_sent_to_a_worker(spec, pixels):
    encoder = ConversationEncoder(spec, 50)
    expected = encoder.encode("k", ASK, pixels(1), ["n"])
    found = pickle.loads(pickle.dumps(encoder)).encode("k", ASK, pixels(1), ["n"])
    assert torch.equal(found.input_ids, expected.input_ids)


def test_text_without_an_image_has_an_empty_stack_of_pixels(spec):
    sample = ConversationEncoder(spec).encode("k", ASK[1:], [], [])
    assert sample.pixel_values.shape == (0, 3, 8, 8)


def test_a_filler_has_no_key_and_nothing_to_learn(spec):
    filler = ConversationEncoder(spec).filler()
    assert (filler.key, filler.labels.tolist(), filler.pixel_values.shape) == ("", [X], (0, 3, 8, 8))


def test_a_text_is_cut_at_the_models_context_where_no_length_is_given(tiny_world):
    spec = tiny_world.language().sample_spec()
    assert spec.context == 128
    turns = (Turn("what ?", "red " * 6_000),)
    sample = ConversationEncoder(spec).encode("long", turns, [], [])
    assert len(sample.input_ids) == 128
    with pytest.raises(UserError, match=r"'long'.*max_length=128"):
        ConversationEncoder(spec).encode("long", (Turn("red " * 6_000, "red"),), [], [])
    assert len(ConversationEncoder(spec, 300).encode("long", turns, [], []).input_ids) == 300
