"""transformers' own server around a model of ours: nothing of the machine is read for a request but what it holds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseHandler, GenerationState, Modality

from moextend_pl.contracts import UserError
from moextend_pl.export.folder import exported, processor_of
from moextend_pl.export.serving.small_requests import SmallRequests
from moextend_pl.export.serving.wishes import LENGTHS, check_wishes, ended, stop_words
from moextend_pl.inference.device import named_device
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.manifest import read_manifest

log = logging.getLogger(__name__)

INLINE = "data:"
BAD_REQUEST = 400


def read(run: Path, base: str | None, task: str, device: str) -> tuple[Any, Any]:
    """Returns model and processor of a run, or of an exported folder.

    Args:
        run: Run directory, exported folder or delta folder.
        base: Where the base lies, if not where the run says.
        task: Name of the task of all questions, where the model was extended for several.
        device: `auto` for a GPU if there is one.

    Raises:
        UserError: If it cannot be loaded.
    """
    place = named_device(device)
    if (run / "processor_config.json").is_file():
        if base or task:
            raise UserError(f"{run} is an exported folder, which holds its base and task. Leave --base and --task out.")
        model: Any = AutoModelForImageTextToText.from_pretrained(run, local_files_only=True)
        return model.to(place).eval(), AutoProcessor.from_pretrained(run, local_files_only=True)
    read_manifest(run).check_hears_not("the server")
    whole = MoExtend.load(run, base)
    model = exported(whole, task)
    return model.to(place).eval(), processor_of(whole.sample_spec())


def build(name: str, model: Any, processor: Any, limit: int) -> FastAPI:
    """Returns the server as an application.

    Args:
        name: Of the model in requests.
        model: Exported.
        processor: Of the model.
        limit: Largest request, in bytes.
    """
    manager, state = OneModel(name, model, processor), GenerationState()
    app = build_server(
        manager,
        Chat(manager, state),
        completion_handler=Completions(manager, state),
        response_handler=Responses(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_middleware(SmallRequests, limit=limit, refusal=_sentence)
    return app


def run(app: FastAPI, host: str, port: int) -> None:
    """Serves until the process is interrupted."""
    uvicorn.run(app, host=host, port=port, log_level="warning")


async def _refused(_: Request, error: Exception) -> JSONResponse:
    """Answers a mistake in a request with its sentence, as OpenAI does."""
    if isinstance(error, HTTPException):
        return _sentence(str(error.detail), error.status_code)
    return _sentence(str(error), BAD_REQUEST)


def _sentence(sentence: str, status: int) -> JSONResponse:
    return JSONResponse({"error": {"message": sentence, "type": "invalid_request_error"}}, status)


class OneModel(ModelManager):
    """Holds one model, whatever a request names.

    Args:
        name: Of the model.
        model: Exported.
        processor: Of the model.
    """

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor
        super().__init__(device="cpu", force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Returns the name as it is: it is neither a place nor a hub's."""
        return model_id

    def _load_processor(self, *_: Any, **__: Any) -> Any:
        return self._processor

    def _load_model(self, *_: Any, **__: Any) -> Any:
        return self._model

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:  # noqa: ARG004 - as transformers calls it
        """Returns that the model takes pictures and texts."""
        return Modality.VLM


class Asked(BaseHandler):
    """What requests may ask for: pictures that they hold themselves, and draws where they give a temperature."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        check_wishes(body)

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Modality) -> list[dict[str, Any]]:
        """Returns messages as the processor takes them.

        Raises:
            UserError: If one is no message, or its picture lies elsewhere: on this machine, or in the web.
        """
        try:
            inputs: list[dict[str, Any]] = BaseHandler.get_processor_inputs_from_messages(messages, modality)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"Expected messages as OpenAI's interface has them, got one without {error}.") from error
        places = [str(part.get("url")) for one in inputs for part in one["content"] if part.get("type") != "text"]
        if outside := [place for place in places if not place.startswith(INLINE)]:
            raise UserError(
                f"Expected each picture as a `data:` address, got {outside[0][:80]!r}. Put the picture itself into the "
                "request; this server opens neither files nor addresses."
            )
        return inputs

    async def handle_request(self, body: dict[str, Any], request_id: str) -> StreamingResponse | JSONResponse:
        """Answers a request, and ends its answer where the first of its `stop` words begins.

        transformers would take the vocabulary apart for minutes to find them, and leave them in the answer.

        Raises:
            UserError: If a stream is to be ended so, whose words are gone when the rest of them comes, or a response,
                whose interface knows no such words.
        """
        stops = stop_words(body)
        if stops and (body.get("stream") or isinstance(self, ResponseHandler)):
            raise UserError("Expected `stop` with completions that are not streamed. Leave it or `stream` out.")
        asked = {name: value for name, value in body.items() if name != "stop"}
        response: StreamingResponse | JSONResponse = await super().handle_request(asked, request_id)  # type: ignore[misc]
        return ended(response, stops) if stops and isinstance(response, JSONResponse) else response

    def _build_generation_config(self, body: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        config = super()._build_generation_config(body, *arguments, **options)
        own = arguments[0] if arguments else options["model_generation_config"]
        if body.get("generation_config") is None:
            config.do_sample = float(body.get("temperature") or 0) > 0
            if all(body.get(name) is None for name in LENGTHS):
                config.max_new_tokens = own.max_new_tokens
        return config


class Chat(Asked, ChatCompletionHandler):
    """Chat completions."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        if "messages" not in body:
            raise UserError("Expected `messages` in the request, got none.")

    get_processor_inputs_from_messages = staticmethod(Asked.get_processor_inputs_from_messages)


class Completions(Asked, CompletionHandler):
    """Completions of a text."""


class Responses(Asked, ResponseHandler):
    """Responses, OpenAI's newer form of the same."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answers at once where a request says nothing of a stream, as OpenAI does."""
        return await super().handle_request({"stream": False, **body}, request_id)

    get_processor_inputs_from_messages = staticmethod(Asked.get_processor_inputs_from_messages)
