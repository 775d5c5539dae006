"""The page in a real browser, and what its server refuses: a process of its own, started by the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml
from helpers.asked import shown
from helpers.servers import free_port, wait_for
from helpers.tiny_world import QUESTION, TinyWorld, make_plan, perturb, picture
from PIL import Image

from moextend_pl.export.demo.answers import Demonstration, Told
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend

pytestmark = pytest.mark.slow
PARTS = ("projector", "new_experts", "new_routers", "calibration")
LIMIT, NEW, SECOND = 400_000, 24, "is it red ?"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Site:
    """A page that is shown, and the model behind it.

    Attributes:
        address: Of the page.
        model: The same as the server's.
        run: Its run directory.
        files: Where pictures to upload are put.
    """

    address: str
    model: MoExtend
    run: Path
    files: Path

    def told(self, *turns: tuple[str, list[Image.Image]]) -> Told:
        """Returns what stands beside the last answer of a conversation."""
        told = Told("")
        for text, pictures in turns:
            *_, told = Demonstration(self.model, max_new_tokens=NEW).ask(told.said, text, pictures)
        return told

    def fetch(self, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Returns status and text of an answer."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = Request(self.address + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urlopen(request, timeout=60) as answer:
                return int(answer.status), answer.read().decode(errors="replace")
        except HTTPError as error:
            return error.code, error.read().decode(errors="replace")


@pytest.fixture(scope="module")
def site(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    folder = tmp_path_factory.mktemp("demo")
    run, temporary = folder / "run", folder / "tmp"
    temporary.mkdir()
    model = tiny_world.model(make_plan((0, 1, 2), init="copy"), parts=PARTS)
    perturb([parameter for name in PARTS for parameter in model.parts()[name]], 0.3)
    save_delta(model, run)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"val": tiny_world.data("vqa", "test")}}}))
    port = free_port()
    options = ["--port", str(port), "--device", "cpu", "--max-new-tokens", str(NEW)]
    command = [sys.executable, "-m", "moextend_pl", "demo", str(run), *options, "--max-megabytes", str(LIMIT / 2**20)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)})
    try:
        wait_for(f"http://127.0.0.1:{port}/", process)
        yield Site(f"http://127.0.0.1:{port}", model, run, folder)
    finally:
        with urlopen(f"http://127.0.0.1:{port}/gradio_api/heartbeat/open"):  # as an open page holds it
            process.send_signal(signal.SIGINT)
            code = process.wait(60)
    assert code == 130
    assert not list(temporary.glob("moextend_demo_*"))  # what was uploaded went with the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("needs a Chromium; on Debian: apt install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, site: Site, **options: Any) -> Any:
    """Opens the page as a visitor of its own; `page.outside` lists what it asked of others."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
    page.outside = []
    page.on("request", lambda request: page.outside.append(request.url))
    page.goto(site.address)
    page.get_by_role("textbox").wait_for()
    return page


def upload(page: Any, path: Path) -> None:
    page.set_input_files("input[type=file]", path)
    page.get_by_label("Remove").or_(page.locator(".thumbnail-item")).first.wait_for()


def ask(page: Any, text: str) -> None:
    """Asks, and keeps all that the newest answer is on its way."""
    page.evaluate(
        """() => { window.heard = []; new MutationObserver(() => {
            const answer = document.querySelector('.mx-going'); if (answer) window.heard.push(answer.textContent);
        }).observe(document.body, {childList: true, subtree: true, characterData: true}); }"""
    )
    page.get_by_role("textbox").fill(text)
    page.get_by_role("textbox").press("Enter")


def newest(page: Any, turns: int) -> Any:
    """Returns the newest turn once it is whole."""
    page.wait_for_function(
        """turns => { const all = document.querySelectorAll('.mx-turn');
        return all.length == turns && all[0].querySelector('.mx-others')
            && ![...all[0].querySelectorAll('dd')].some(dd => dd.textContent == '…'); }""",
        arg=turns,
        timeout=60_000,
    )
    return page.locator(".mx-turn").first


def check(turn: Any, expected: Told) -> None:
    """Compares what a turn shows with what was told in this process."""
    assert turn.locator(".mx-answer").text_content() == expected.answer
    assert turn.locator(".mx-base").text_content() == expected.base
    assert turn.locator(".mx-blind").text_content() == expected.blind
    assert expected.chosen is not None
    for kind, layers in expected.chosen.counts.items():
        for layer in layers:
            row = turn.locator(f"[data-kind={kind}] [data-layer='{layer}']")
            cells = [cell for cell in row.locator("i").all_text_contents() if cell]
            assert cells == [f"{100 * share:.0f}" for share in expected.chosen.shares(kind, layer)]
            assert row.locator("b").text_content() == f"{expected.chosen.new_share(kind, layer):.0%}"


def test_a_visitor_uploads_asks_reads_and_looks(site: Site, browser: Any) -> None:
    page, other = opened(browser, site), opened(browser, site, color_scheme="dark")
    (site.files / "mine.png").write_bytes(picture(1))
    upload(page, site.files / "mine.png")
    ask(page, QUESTION)
    ask(other, QUESTION)
    first, alone = site.told((QUESTION, [shown(1)])), site.told((QUESTION, []))
    turn = newest(page, 1)
    check(turn, first)
    assert turn.locator("img").count() == 1
    answer = str(site.model.generate(shown(1), QUESTION, max_new_tokens=NEW))
    assert turn.locator(".mx-answer").text_content() == answer
    heard = [piece for piece in page.evaluate("window.heard") if piece]
    assert len({*heard}) > 2
    assert all(answer.startswith(piece) for piece in heard)
    quiet = newest(other, 1)
    assert quiet.locator(".mx-answer").text_content() == alone.answer
    assert quiet.locator(".mx-base").text_content() == alone.answer  # masked routing: text is the base's, bit for bit
    assert quiet.locator("[data-kind=image]").count() == 0
    ask(page, SECOND)
    check(newest(page, 2), site.told((QUESTION, [shown(1)]), (SECOND, [])))
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_function("!document.querySelector('.mx-turn')")
    page.locator(".gallery-item").first.click()
    page.locator(".thumbnail-item").first.wait_for()
    page.get_by_role("textbox").press("Enter")
    check(newest(page, 1), site.told((QUESTION, [shown(24)])))
    elsewhere = [url for url in (*page.outside, *other.outside) if not url.startswith((site.address, "data:", "blob:"))]
    assert elsewhere == []
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_pictures_that_are_too_large_are_refused_in_a_sentence(site: Site, browser: Any) -> None:
    page = opened(browser, site)
    many, heavy = site.files / "many.png", site.files / "heavy.png"
    Image.new("1", (9000, 9000)).save(many)
    Image.frombytes("RGB", (400, 400), os.urandom(480_000)).save(heavy)
    upload(page, many)
    ask(page, QUESTION)
    page.get_by_role("alert").filter(has_text="many.png: expected at most 64000000 pixels, got 9000 x 9000.").wait_for()
    page.set_input_files("input[type=file]", heavy)
    page.get_by_text(f"Expected a request of at most {LIMIT} bytes").wait_for()
    ask(page, QUESTION)
    page.wait_for_function("document.querySelectorAll('.mx-answer').length == 1")


def test_the_server_hands_out_no_file_and_fetches_no_address(site: Site) -> None:
    (status, config) = site.fetch("/config")
    assert status == 200
    secret = site.run / "manifest.json"
    for place in ("/etc/passwd", str(secret), f"..{secret}", os.path.relpath(__file__), "~/.bashrc"):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file%3D", "/static/../../"):
            code, text = site.fetch(route + place)
            assert code in (400, 403, 404), (route, place)
            assert "root:" not in text
            assert '"schema"' not in text
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        own = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        for route in ("/gradio_api/file=", "/gradio_api/proxy=", "/proxy="):
            assert site.fetch(route + own)[0] in (400, 403, 404)
        ids = [entry["id"] for entry in json.loads(config)["dependencies"] if entry["targets"][0][1] == "submit"]
        for number, path in enumerate(("/etc/passwd", str(secret), own)):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            body = {"data": [{"text": QUESTION, "files": [file]}, None], "fn_index": ids[0]}
            site.fetch("/gradio_api/queue/join", {**body, "session_hash": f"forged{number}"})
            events = site.fetch(f"/gradio_api/queue/data?session_hash=forged{number}")[1]
            assert '"success":false' in events.replace(" ", ""), events
            assert "mx-answer" not in events
        with pytest.raises(TimeoutError):
            listener.accept()


def test_the_server_is_no_api_and_answers_to_its_own_name_only(site: Site) -> None:
    assert site.fetch("/", Host="elsewhere.example")[0] == 400
    assert site.fetch("/gradio_api/queue/join", b"{" + b" " * LIMIT + b"}")[0] == 413
    assert json.loads(site.fetch("/gradio_api/info")[1])["named_endpoints"] == {}
    for closed in ("/docs", "/gradio_api/mcp/", "/monitoring", "/vibe"):
        assert site.fetch(closed)[0] in (401, 403, 404)
