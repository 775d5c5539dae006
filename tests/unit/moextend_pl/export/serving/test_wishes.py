"""A request that asks for what the server does not do is refused, and what changes nothing is taken."""

from __future__ import annotations

from typing import Any

import pytest

from moextend_pl.contracts import UserError
from moextend_pl.export.serving.wishes import check_wishes


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 1, "logprobs": False, "presence_penalty": 0.0, "stop": None, "response_format": {"type": "text"}},
        {"max_tokens": 1, "temperature": 0, "top_p": 1.0},
        {"generation_config": '{"max_new_tokens": 3, "num_beams": 2}', "seed": 1, "frequency_penalty": 0.5, "text": {}},
        {"temperature": 2.0, "top_p": None, "max_completion_tokens": None},
    ],
    ids=str,
)
def test_what_changes_nothing_is_taken(body: dict[str, Any]) -> None:
    check_wishes(body)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"n": 2}, "without `n`, got '2'"),
        ({"echo": True}, "without `echo`"),
        ({"logprobs": 5}, "without `logprobs`"),
        ({"response_format": {"type": "json_object"}}, "without `response_format`"),
        ({"text": {"format": {"type": "json_schema"}}}, "without `text`"),
        ({"max_tokens": 0}, "`max_tokens` of at least 1, got 0"),
        ({"max_output_tokens": -1}, "`max_output_tokens` of at least 1"),
        ({"max_completion_tokens": "9"}, "at least 1, got '9'"),
        ({"temperature": -1}, "`temperature` 0 or above, got -1"),
        ({"temperature": "hot"}, "`temperature` 0 or above, got 'hot'"),
        ({"temperature": float("nan")}, "`temperature` 0 or above, got nan"),
        ({"top_p": 0}, "`top_p` above 0 and at most 1, got 0"),
        ({"top_p": 2}, "`top_p` above 0 and at most 1, got 2"),
        ({"frequency_penalty": -1}, "`frequency_penalty` above -1, got -1"),
        ({"seed": "x"}, "`seed` as a whole number, got 'x'"),
        ({"generation_config": '{"reduce": "aim"}'}, "`generation_config` without `reduce`"),
        ({"generation_config": '{"num_return_sequences": 3}'}, "without `num_return_sequences`"),
        ({"generation_config": '{"stop_strings": ["it"]}'}, "without `stop_strings`"),
        ({"generation_config": "nonsense"}, "with a JSON object, got 'nonsense'"),
        ({"generation_config": {"max_new_tokens": 3}}, "as a text with a JSON object"),
    ],
    ids=str,
)
def test_what_nobody_would_do_is_refused(body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_wishes(body)
