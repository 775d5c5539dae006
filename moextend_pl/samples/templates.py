"""Chat templates: the one a tokenizer brings, one of ours, or a file; and the texts that they make of conversations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import Turn

INST = (
    "{{ bos_token }}{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\n\n' %}"
    "{% elif message['role'] == 'user' %}[INST] {{ ns.system + message['content'] }} [/INST]{% set ns.system = '' %}"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('expected only system, user and assistant, got ' + message['role']) }}"
    "{% endif %}{% endfor %}"
)
"""`<s>[INST] question [/INST] answer</s>[INST] ...`, as Mixtral and MoExtend write it; a system text stands before the
first question."""

NAMED_TEMPLATES = {"inst": INST}
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, str]


def load_tokenizer(folder: str | Path, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Reads a tokenizer.

    Args:
        folder: Its folder.
        chat_template: `inst`, a file with a Jinja template, or None for the tokenizer's own.

    Raises:
        UserError: If there is no such folder or file, or the folder holds no tokenizer.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"Expected a tokenizer folder at {folder}, found none (cwd {Path.cwd()}). Build the shards first."
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a damaged file makes the tokenizers library raise a plain Exception
        raise UserError(
            f"Expected a tokenizer that transformers can load at {folder}, got: {error}. Give the folder in which "
            "tokenizer.json and tokenizer_config.json lie."
        ) from error
    if chat_template in NAMED_TEMPLATES:
        tokenizer.chat_template = NAMED_TEMPLATES[chat_template]
    elif chat_template is not None:
        if not Path(chat_template).is_file():
            raise UserError(
                f"Expected `chat_template` to be one of {list(NAMED_TEMPLATES)}, a file with a Jinja template, or null "
                f"for the tokenizer's own, got {chat_template!r} (cwd {Path.cwd()})."
            )
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


def messages_of(turns: tuple[Turn, ...]) -> list[Message]:
    """Returns a conversation as chat templates take it."""
    messages = []
    for turn in turns:
        if turn.system:
            messages.append({"role": "system", "content": turn.system})
        messages.append({"role": "user", "content": turn.human})
        messages.append({"role": "assistant", "content": turn.gpt})
    return messages


def apply_template(tokenizer: PreTrainedTokenizerBase, steps: list[list[Message]], prompt: bool) -> list[str]:
    """Renders conversations, with `prompt` also what stands before the next answer.

    Raises:
        UserError: If the template refuses one.
    """
    try:
        return list(tokenizer.apply_chat_template(steps, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # templates are programs, and raise what they like
        raise UserError(
            f"The tokenizer's chat template refuses a conversation of questions and answers: {error}. Choose another "
            "by `chat_template`."
        ) from error


def answer_spans(tokenizer: PreTrainedTokenizerBase, turns: tuple[Turn, ...]) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation and finds its answers: what the template adds after its own generation prompt.

    A template that marks its answers by `{% generation %}` says itself where they are. Any other is rendered in
    growing steps; what a step adds after the generation prompt is the answer, end token included.

    Returns:
        The text, and (start, end) of each answer in characters.

    Raises:
        UserError: If the text before an answer is not what generation would be given, or the template refuses.
    """
    messages = messages_of(turns)
    ends = [place + 1 for place, message in enumerate(messages) if message["role"] == "assistant"]
    template = tokenizer.get_chat_template()
    if GENERATION_TAG.search(template):
        text, spans = _marked(tokenizer, template, messages)
        prompt = apply_template(tokenizer, [messages[:-1]], prompt=True)[0]
        if len(spans) != len(turns) or text[: spans[-1][0]] != prompt:
            raise _changing(len(turns) - 1, len(turns))
        return text, spans
    prompts = apply_template(tokenizer, [messages[: end - 1] for end in ends], prompt=True)
    fulls = apply_template(tokenizer, [messages[:end] for end in ends], prompt=False)
    text = ""
    answers: list[tuple[int, int]] = []
    for prompt, full in zip(prompts, fulls, strict=True):
        if not prompt.startswith(text) or not full.startswith(prompt):
            raise _changing(len(answers), len(turns))
        answers.append((len(prompt), len(full)))
        text = full
    return text, answers


def _marked(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[Message]
) -> tuple[str, list[tuple[int, int]]]:
    render: Any = render_jinja_template  # its annotations promise a text; it returns texts and spans
    try:
        texts, spans = render(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
    except Exception as error:  # as above
        raise UserError(
            f"The tokenizer's chat template refuses a conversation of questions and answers: {error}. Choose another "
            "by `chat_template`."
        ) from error
    return texts[0], [(int(start), int(end)) for start, end in spans[0]]


def _changing(turn: int, turns: int) -> UserError:
    return UserError(
        "Expected a chat template whose text only grows as turns are added, got one that changes what it wrote "
        f'before, at turn {turn} of {turns} (templates that hide earlier thoughts do so). Use `turns: "single"`, or '
        "choose another template by `chat_template`."
    )
