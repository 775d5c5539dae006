"""Asks vLLM's engine: `python ask_engine.py FOLDER QUESTIONS ANSWERS`, where both are JSON files."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: str, questions: str, answers: str) -> None:
    """Writes ids of prompts and answers of all questions, which are asked at once, and how a lone mark is refused."""
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    # Passes shorter than some prompts: the beginning of a question is computed before its picture.
    engine = LLM(folder, dtype="float32", max_model_len=128, max_num_seqs=4, max_num_batched_tokens=16)
    outputs = engine.chat(asked["chats"], SamplingParams(temperature=0, max_tokens=asked["length"], ignore_eos=True))
    try:
        engine.generate("<image> what", SamplingParams(max_tokens=1))
        refused = ""
    except VLLMValidationError as error:
        refused = str(error)
    told = {
        "prompts": [list(output.prompt_token_ids or []) for output in outputs],
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "refused": refused,
    }
    Path(answers).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
