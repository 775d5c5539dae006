"""The page itself: gradio's parts around a demonstration, and the server that shows it."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from types import FrameType
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import PlainTextResponse

from moextend_pl.export.demo.answers import Demonstration
from moextend_pl.export.demo.conversation_html import conversation_html
from moextend_pl.export.demo.page_style import STYLE
from moextend_pl.export.demo.samples import DataSample
from moextend_pl.export.demo.visit import Visit, next_turn
from moextend_pl.export.serving.small_requests import SmallRequests

WAITING = 16
"""Questions that may wait for their turn; the next ones are told to come back."""

CLEANING, KEPT = 600, 3600
"""Seconds between two looks for uploads that nobody needs, and how old those are."""

PATIENCE = 1
"""Seconds that open pages are waited for at the end."""

KINDS = [".png", ".jpg", ".jpeg", ".webp"]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; object-src 'none'; base-uri 'self'; frame-ancestors 'none'"
)
"""Nothing is loaded from elsewhere; gradio's own scripts stand in the page and make functions of texts."""


def build(demonstration: Demonstration, title: str, samples: Sequence[tuple[DataSample, Path]]) -> gr.Blocks:
    """Returns the page.

    Args:
        demonstration: Who answers.
        title: Of the page.
        samples: Questions to choose from, with files of their pictures.
    """

    def ask(asked: dict[str, Any], visit: Visit) -> Iterator[tuple[Any, ...]]:
        yield gr.skip(), conversation_html(visit.settled), "", {"text": "", "files": []}
        for now in next_turn(demonstration, visit, asked):
            yield now, gr.skip(), conversation_html(now.turns[-1:]), gr.skip()

    with gr.Blocks(analytics_enabled=False, title=title, delete_cache=(CLEANING, KEPT)) as page:
        gr.HTML(_head(demonstration, title))
        visit = gr.State(Visit())
        box = gr.MultimodalTextbox(
            show_label=False,
            file_types=KINDS,
            file_count="multiple",
            sources=["upload"],
            placeholder="Ask about a picture",
            max_plain_text_length=100_000,  # what is longer would become a file
            autofocus=True,
        )
        with gr.Row(elem_classes="mx-buttons"):
            stop = gr.Button("Stop", size="sm", variant="secondary")
            anew = gr.Button("New conversation", size="sm", variant="secondary")
        if samples:
            examples = [[{"text": sample.question, "files": [str(path)]}] for sample, path in samples]
            with gr.Column(elem_classes="mx-examples"):
                gr.Examples(examples, box, label="From this run's data", api_visibility="private")
        newest, earlier = gr.HTML(), gr.HTML()
        outputs = [visit, earlier, newest, box]
        asked = box.submit(
            ask, [box, visit], outputs, concurrency_limit=1, show_progress="hidden", api_visibility="private"
        )
        stop.click(None, cancels=[asked], api_visibility="private")
        anew.click(
            lambda: (Visit(), "", "", {"text": "", "files": []}),
            outputs=outputs,
            cancels=[asked],
            show_progress="hidden",
            api_visibility="private",
        )
    return page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


def serve(page: gr.Blocks, host: str, port: int, limit: int) -> None:
    """Shows a page until the process is interrupted.

    Args:
        page: As `build` returns it.
        host: Address to listen at.
        port: Of it.
        limit: Largest request, in bytes.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that uploads are deleted
    app = application(page, host, limit)
    # An open page holds a connection that never ends.
    how: dict[str, Any] = {"host": host, "port": port, "log_level": "warning", "timeout_graceful_shutdown": PATIENCE}
    server = _Server(uvicorn.Config(app, **how))
    server.run()
    if server.interrupted:  # where the loop had ended before it was told
        raise KeyboardInterrupt


class _Server(uvicorn.Server):
    """Ends without telling of every open page that it no longer waits for.

    Attributes:
        interrupted: Whether that was by SIGINT.
    """

    interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)


def application(page: gr.Blocks, host: str, limit: int) -> FastAPI:
    """Returns the server as an application: no API, no file but uploads, no request that is too large."""
    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        # gradio would fetch an address for whoever asks.
        if "file=http" in request.url.path.lower():
            return PlainTextResponse("This server opens no addresses.", 403)
        response: Response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    app.add_middleware(SmallRequests, limit=limit, refusal=PlainTextResponse)
    if host in LOOPBACK:  # a page elsewhere may lead its name to this machine
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK])
    return gr.mount_gradio_app(
        app,
        page,
        "/",
        server_name=host,
        allowed_paths=[],
        show_error=False,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=gr.themes.Soft(
            primary_hue="orange", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
        css=STYLE,
    )


def _head(demonstration: Demonstration, title: str) -> str:
    plans, old = demonstration.model.plans, demonstration.old
    new = sum(len(growth.sources) for plan in plans for growth in plan.layers)
    grown = {growth.layer for plan in plans for growth in plan.layers}
    facts = f"{len(old)} layers with {sum(old.values())} experts" if old else "a language model without experts"
    if new:
        facts += f", and {new} new one{'s' if new > 1 else ''} in {len(grown)} of the layers"
    return f'<div class="mx-head"><h1>{escape(title)}</h1><p>{facts}</p></div>'
