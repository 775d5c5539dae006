"""The command serves a run by transformers' own server; the official client gets the answers of `generate`."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.servers import free_port, wait_for
from helpers.tiny_world import QUESTION, TinyWorld, make_plan, perturb, picture

from moextend_pl import cli
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend

PARTS = ("projector", "new_experts", "new_routers", "calibration")
LIMIT = 60_000


def test_extra_that_is_not_installed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "moextend_pl.export.serving.server", raising=False)
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert 'pip install "moextend_pl[serve]"' in capsys.readouterr().err
    assert cli.main(["serve", str(tmp_path), "--max-megabytes", "0"]) == 2
    assert "Expected `--max-megabytes` above 0" in capsys.readouterr().err


@pytest.fixture(scope="module")
def served(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, MoExtend]]:
    """The official client of a server, which is a process of its own, and the model that it serves."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    run = tmp_path_factory.mktemp("served") / "run"
    model = tiny_world.model(make_plan(init="copy"), parts=PARTS)
    perturb([parameter for name in PARTS for parameter in model.parts()[name]], 0.3)
    save_delta(model, run)
    port = free_port()
    options = ["--port", str(port), "--name", "tiny", "--max-megabytes", str(LIMIT / 2**20), "--device", "cpu"]
    command = [sys.executable, "-m", "moextend_pl", "serve", str(run), *options]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0), model
    finally:
        process.terminate()
        process.wait(30)


def question(number: int | None = None, text: str = QUESTION) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if number is not None:
        data = base64.b64encode(picture(number)).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return [{"role": "user", "content": parts}]


def answered(client: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    made = client.chat.completions.create(model="tiny", messages=messages, **options)
    return str(made.choices[0].message.content).strip()


@pytest.mark.slow
def test_served_answers_are_those_of_generate(served: tuple[Any, MoExtend]) -> None:
    client, model = served
    assert [entry.id for entry in client.models.list()] == ["tiny"]
    asked = [question(), *(question(number) for number in range(4))]
    asked.append([*question(1), {"role": "assistant", "content": "red"}, *question(2, "is it red ?")])
    expected = [model.generate(messages) for messages in asked]
    assert len(set(expected)) > 1
    assert [answered(client, messages) for messages in asked] == expected
    longer = model.generate(asked[1], max_new_tokens=12)
    assert answered(client, asked[1], max_tokens=12) == longer
    pieces = client.chat.completions.create(model="tiny", messages=asked[1], max_tokens=12, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces).strip() == longer
    response = client.responses.create(model="tiny", input=QUESTION)
    assert response.output_text.strip() == expected[0]
    with ThreadPoolExecutor(2) as clients:
        assert list(clients.map(lambda messages: answered(client, messages), asked * 2)) == expected * 2
    stop = longer.split()[1]
    assert answered(client, asked[1], max_tokens=12, stop=["nowhere", stop]) == longer[: longer.index(stop)].strip()
    assert answered(client, asked[1], max_tokens=12, stop="nowhere") == longer
    text = client.completions.create(model="tiny", prompt="red", max_tokens=8).choices[0].text
    cut = client.completions.create(model="tiny", prompt="red", max_tokens=8, stop=text.split()[-1]).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(text.split()[-1])], "stop")
    drawn = {answered(client, asked[0], temperature=5.0, seed=seed) for seed in range(4)}
    assert len(drawn) > 1


@pytest.mark.slow
def test_mistakes_in_requests_are_answered_and_the_server_goes_on(served: tuple[Any, MoExtend]) -> None:
    client, model = served
    openai = sys.modules["openai"]
    damaged, elsewhere, web = question(0), question(0), question(0)
    damaged[0]["content"][0]["image_url"]["url"] = "data:image/png;base64,AAAA"
    elsewhere[0]["content"][0]["image_url"]["url"] = "/etc/hostname"
    web[0]["content"][0]["image_url"]["url"] = "http://127.0.0.1/a.png"
    for messages, sentence in (
        (damaged, "expected an image as PNG, JPEG, WEBP"),
        (elsewhere, "this server opens neither files nor addresses"),
        (web, "this server opens neither files nor addresses"),
        (question(None, "red " * 200), "fewer positions than the model's context, 128"),
        ([{"role": "assistant", "content": "red"}], "'user' first and last"),
        ([{"content": "red"}], "without 'role'"),
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=sentence):
                client.chat.completions.create(model="tiny", messages=messages, stream=stream)
    with pytest.raises(openai.APIStatusError, match="at most 60000 bytes") as large:
        answered(client, question(None, "r" * LIMIT))
    assert large.value.status_code == 413
    for options in ({"stop": ["red"], "stream": True}, {"stop": [3]}):
        with pytest.raises(openai.BadRequestError, match="Expected `stop`"):
            client.chat.completions.create(model="tiny", messages=question(), **options)
    with pytest.raises(openai.BadRequestError, match="Expected `stop`"):
        client.responses.create(model="tiny", input="red", extra_body={"stop": "red"})
    with pytest.raises(openai.BadRequestError, match="`max_tokens` of at least 1, got 0"):
        answered(client, question(), max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="pinned to 'tiny'"):
        client.chat.completions.create(model="another", messages=question())
    with pytest.raises(openai.BadRequestError, match="Expected `messages`"):
        client.post("/chat/completions", body={"model": "tiny"}, cast_to=object)
    assert answered(client, question(1)) == model.generate(question(1))


@pytest.mark.slow
def test_body_that_hides_its_size_is_too_large_as_well(served: tuple[Any, MoExtend]) -> None:
    client, _ = served
    host, port = client.base_url.host, client.base_url.port
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    body = b"r" * 30_000
    with socket.create_connection((host, port), timeout=60) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(3):
            connection.sendall(f"{len(body):x}\r\n".encode() + body + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert b"413" in connection.recv(4096).split(b"\r\n")[0]
