"""Questions with sounds: by keyword, by messages, in a conversation and by the command, as the data has them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from helpers.sounds import (
    both_entry,
    hearing_batch,
    hearing_model,
    sound_entry,
    sound_file,
    tiny_whisper,
    tone,
    wave,
)
from helpers.tiny_world import QUESTION, TinyWorld, make_plan, perturb, picture

from moextend_pl import cli
from moextend_pl.cli.chat import converse
from moextend_pl.contracts import UserError
from moextend_pl.inference.chat import Chat
from moextend_pl.inference.pictures import open_picture
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend

NEW = ("new_experts", "new_routers", "calibration", "hearing")
NUMBERS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def model(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> MoExtend:
    """A model that hears, whose answers depend on what it hears."""
    folder = tmp_path_factory.mktemp("hears")
    plan = make_plan((1, 2), (0,), routing="masked_sound")
    model = hearing_model(tiny_world, tiny_whisper(folder / "whisper"), None, plan, NEW)
    perturb([p for name in NEW for p in model.parts()[name]], 0.5, seed=7)
    return model


@pytest.fixture(scope="module")
def expected(model: MoExtend) -> list[str]:
    """What the data's own prompts are answered."""
    answers = [model.answer(hearing_batch(model, [sound_entry(number)], generation=True))[0] for number in NUMBERS]
    assert len(set(answers)) > 1  # else nothing is shown here
    return answers


def test_a_sound_is_asked_about_as_the_data_has_it(model: MoExtend, expected: list[str], tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.wav" for number in NUMBERS]
    for number, file in zip(NUMBERS, files, strict=True):
        file.write_bytes(tone(number))
    assert [model.generate(None, QUESTION, sounds=file) for file in files] == expected
    assert model.generate(None, [QUESTION] * 4, sounds=[tone(number) for number in NUMBERS]) == expected
    assert model.generate(None, [QUESTION] * 2, sounds=str(files[1])) == [expected[1]] * 2
    assert "".join(model.generate(None, QUESTION, sounds=[files[2]], stream=True)) == expected[2]


def test_messages_have_sounds_where_their_parts_stand(model: MoExtend, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "tone.wav").write_bytes(tone(1))
    inline = {"data": base64.b64encode(tone(1)).decode(), "format": "wav"}
    file = {"type": "audio", "audio": str(tmp_path / "tone.wav")}
    for sound in (file, {"type": "input_audio", "input_audio": inline}):
        content = [sound, {"type": "text", "text": QUESTION}]
        assert model.generate([{"role": "user", "content": content}]) == expected[1]
        both = [sound, {"type": "image", "image": open_picture(_png(tmp_path))}, {"type": "text", "text": QUESTION}]
        of_data = model.answer(hearing_batch(model, [both_entry(1)], generation=True))
        assert [model.generate([{"role": "user", "content": both}])] == of_data


def _png(folder: Path) -> str:
    (folder / "picture.png").write_bytes(picture(1))
    return str(folder / "picture.png")


def test_a_conversation_keeps_what_was_heard(model: MoExtend, expected: list[str]) -> None:
    chat = Chat(model)
    assert "".join(chat.ask(QUESTION, sounds=[tone(3)])) == expected[3]
    again = "".join(chat.ask(QUESTION))
    messages = [
        {"role": "user", "content": [_part(3), {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": expected[3]},
        {"role": "user", "content": QUESTION},
    ]
    assert model.generate(messages) == again


def _part(number: int) -> dict[str, object]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(tone(number)).decode(), "format": "wav"}}


def test_the_commands_take_a_sound(
    model: MoExtend,
    expected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_delta(model, tmp_path / "run")
    (tmp_path / "tone.wav").write_bytes(tone(2))
    place, run = str(tmp_path / "tone.wav"), str(tmp_path / "run")
    assert cli.main(["generate", "--checkpoint", run, "--sound", place, "--prompt", QUESTION, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["answer"], told["sounds"], told["images"]) == (expected[2], [place], [])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/sound {place}\n{QUESTION}\n"))
    assert cli.main(["chat", "--checkpoint", run]) == 0
    assert capsys.readouterr().out.strip() == expected[2]


def test_a_damaged_sound_is_told_at_once_and_in_the_way_of_no_question(model: MoExtend, tmp_path: Path) -> None:
    (tmp_path / "damaged.wav").write_bytes(tone(1)[:20])
    (tmp_path / "long.wav").write_bytes(sound_file(wave(1, 1.5)))
    out = io.StringIO()
    lines = [f"/sound {tmp_path / name}.wav" for name in ("damaged", "long")]
    converse(Chat(model, max_new_tokens=3), [*lines, QUESTION], out, ([], []), forgiving=True)
    damaged, long, answer = out.getvalue().splitlines()
    assert "damaged.wav: expected a sound as WAV, FLAC, MP3; libsndfile says" in damaged
    assert "long.wav: expected a sound of at most 1 seconds, got a longer one" in long
    assert answer == model.generate(None, QUESTION, max_new_tokens=3)


def test_what_cannot_be_heard_is_refused_in_a_sentence(model: MoExtend, tiny_world: TinyWorld, tmp_path: Path) -> None:
    deaf = tiny_world.model(make_plan())
    with pytest.raises(UserError, match="for a model that does not hear, got a sound. Ask a model with `hearing`"):
        deaf.generate(None, QUESTION, sounds=tone(1))
    with pytest.raises(UserError, match="Expected a sound at .*none.wav, found no file"):
        model.generate(None, QUESTION, sounds=tmp_path / "none.wav")
    with pytest.raises(UserError, match="expected a sound as WAV, FLAC, MP3; it begins as none of them"):
        model.generate(None, QUESTION, sounds=b"no sound at all")
    with pytest.raises(UserError, match="as many entries of sounds as questions, got 1 for 2"):
        model.generate(None, [QUESTION] * 2, sounds=[tone(1)])
    with pytest.raises(UserError, match="Expected sounds as parts of the messages"):
        model.generate([{"role": "user", "content": QUESTION}], sounds=tone(1))
    with pytest.raises(UserError, match="a list of them, or None, got NoneType"):
        model.generate([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"format": "wav"}}]}])
    with pytest.raises(UserError, match="bytes of a sound's file, a path or address of one, a list of them, or None"):
        model.generate(None, QUESTION, sounds=3)
