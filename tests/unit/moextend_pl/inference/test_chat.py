"""A conversation: every turn is asked with all before it, as training would show it; pictures in any turn."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from helpers.asked import endless, shown
from helpers.tiny_world import QUESTION, TinyWorld, picture

from moextend_pl import cli
from moextend_pl.cli.chat import converse
from moextend_pl.contracts import UserError
from moextend_pl.inference.chat import Chat
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend


@pytest.fixture(scope="module")
def model(tiny_world: TinyWorld) -> MoExtend:
    return endless(tiny_world)


@pytest.fixture(scope="module")
def run(model: MoExtend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_delta(model, folder)
    return folder


def test_every_turn_is_asked_with_all_that_was_said_and_shown(model: MoExtend, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(picture(1))
    chat = Chat(model, system="a small picture .", max_new_tokens=4)
    first = "".join(chat.ask(QUESTION, [shown(0)]))
    second = "".join(chat.ask("is it red ?"))
    third = "".join(chat.ask("is it blue ?", [tmp_path / "picture.png"]))
    messages = [{"role": "system", "content": "a small picture ."}]
    asked = ((QUESTION, [shown(0)]), ("is it red ?", []), ("is it blue ?", [shown(1)]))
    for (text, pictures), answer in zip(asked, (first, second, third), strict=True):
        parts = [{"type": "image", "image": one} for one in pictures]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
        assert model.generate(messages, max_new_tokens=4) == answer
        messages.append({"role": "assistant", "content": answer})
    chat.begin_anew()
    assert "".join(chat.ask(QUESTION, [shown(0)])) == first


def test_a_mistake_and_an_answer_that_nobody_heard_leave_the_conversation_as_it_was(model: MoExtend) -> None:
    chat = Chat(model, max_new_tokens=4)
    list(chat.ask(QUESTION))
    said = chat.said
    for mistake in ("<image>", " ", "small " * 200):
        with pytest.raises(UserError):
            list(chat.ask(mistake))
    unheard = chat.ask("is it red ?")
    next(unheard)
    unheard.close()
    assert chat.said is said


def test_lines_are_questions_and_commands(model: MoExtend, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(picture(1))
    out = io.StringIO()
    lines = [
        f"/image {tmp_path / 'picture.png'}\n",
        f"{QUESTION}\n",
        "\n",
        "/new\n",
        f"{QUESTION}\n",
        "/quit\n",
        "never",
    ]
    converse(Chat(model, max_new_tokens=3), lines, out, ([], []), forgiving=False)
    expected = [model.generate(about, QUESTION, max_new_tokens=3) for about in (shown(1), None)]
    assert out.getvalue().splitlines() == expected


def test_a_person_may_put_a_mistake_right_and_a_script_may_not(model: MoExtend) -> None:
    out = io.StringIO()
    lines = ["/imag a.png", "/image nowhere.png", "/sound", QUESTION]
    converse(Chat(model, max_new_tokens=2), lines, out, ([], []), forgiving=True)
    told = out.getvalue().splitlines()
    assert told[0] == "error: There is no command /imag; choose one of /image PLACE, /sound PLACE, /new, /quit."
    assert "found no file" in told[1]
    assert told[2] == "error: Expected a file or an https address after /sound, got nothing. Name one."
    assert told[3] == model.generate(None, QUESTION, max_new_tokens=2)
    with pytest.raises(UserError, match="found no file"):
        converse(Chat(model), ["/image nowhere.png", QUESTION], out, ([], []), forgiving=False)


def test_a_chat_runs_from_standard_input(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "picture.png").write_bytes(picture(1))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\nis it red ?\n"))
    command = ["chat", "--checkpoint", str(run), "--image", str(tmp_path / "picture.png"), "--max-new-tokens", "3"]
    assert cli.main(command) == 0
    chat = Chat(MoExtend.load(run), max_new_tokens=3)
    expected = ["".join(chat.ask(QUESTION, [shown(1)])), "".join(chat.ask("is it red ?"))]
    assert capsys.readouterr().out.splitlines() == expected
    assert cli.main(["chat", "--checkpoint", str(run), "--temperature", "-1"]) == 2
    assert "`temperature` of at least 0" in capsys.readouterr().err
