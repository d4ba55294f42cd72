"""The HTTP application: OpenAI's chat completions, models, health."""

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send

from vlm_sft.data.images import ImageCrops
from vlm_sft.errors import UserError
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.inference.prompts import as_conversation
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.positions import position_limit
from vlm_sft.serving.engine import Engine, Job, Piece, QueueFull, Sampling, Stopped
from vlm_sft.serving.errors import RequestError
from vlm_sft.serving.memory import Held, Memory
from vlm_sft.serving.page import add_page
from vlm_sft.serving.protocol import ChatRequest, Limits, Response

logger = logging.getLogger(__name__)

DISCONNECT_SECONDS: Final = 0.5
"""Seconds between checks whether a client that waits is still connected."""
BODY_SECONDS: Final = 60.0
"""A request has to arrive within this time."""
DISCARD_SECONDS: Final = 10.0
"""The rest of a refused request is read for this time, so that its client sees the response."""
LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
FETCHES: Final = 8
"""Requests whose images are fetched at the same time; slow hosts hold up no other requests."""


@dataclass(frozen=True)
class ServedModel:
    """A model of the server.

    Attributes:
        name: Its name in the API.
        loaded: For tokenizing prompts.
        engine: Generates; closed when the application shuts down.
    """

    name: str
    loaded: LoadedModel
    engine: Engine

    @cached_property
    def max_prompt_tokens(self) -> int | None:
        """Longest prompt with room for one more token; None: not limited."""
        limit = position_limit(causal_lm(self.loaded.model.language_model))
        return None if limit is None else limit.tokens - 1

    @cached_property
    def max_token_characters(self) -> int:
        """Characters of the longest token."""
        vocabulary: Any = self.loaded.tokenizer
        return max(map(len, vocabulary.get_vocab()), default=1)


def make_app(
    models: Sequence[ServedModel],
    limits: Limits,
    api_key: str | None,
    *,
    local_only: bool = False,
    with_page: bool = False,
) -> FastAPI:
    """Return the application.

    Args:
        models: The models; requests that name none are answered by the first.
        limits: What a request may ask for.
        api_key: The key that requests must carry as a bearer token; None: none.
        local_only: Requests must name this machine as their host. A web page whose name resolves
            to this machine (DNS rebinding) is refused.
        with_page: Whether `/` is a chat page.
    """
    by_name = {model.name: model for model in models}
    memory = Memory(limits.max_memory)
    fetching = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for model in models:
            await asyncio.to_thread(model.engine.close)
        fetching.shutdown(wait=False)

    app = FastAPI(title="vlm_sft", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_error_handlers(app)
    if with_page:
        add_page(app, limits, needs_key=api_key is not None)

    async def authorize(request: Request) -> None:
        refusal = None
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            refusal = RequestError(401, "invalid_api_key", "wrong or missing API key")
        if local_only and request.url.hostname not in LOCAL_NAMES:
            refusal = RequestError(
                403, "host_not_allowed", f"the address in the request is not {LOCAL_NAMES[0]}"
            )
        if refusal is not None:
            await _discard_body(request)
            raise refusal

    def find(name: str | None) -> ServedModel:
        if (found := by_name.get(name) if name else models[0]) is None:
            names = " and ".join(map(repr, by_name))
            raise RequestError(
                404, "model_not_found", f"model: there is no {name!r}; this server has {names}"
            )
        return found

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = all(model.engine.alive for model in models)
        waiting = sum(model.engine.waiting for model in models)
        running = sum(model.engine.running for model in models)
        status = {"status": "ok" if alive else "failed", "waiting": waiting, "running": running}
        return JSONResponse(status, 200 if alive else 503)

    @app.get("/v1/models", dependencies=[Depends(authorize)])
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_entry(name) for name in by_name]}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(authorize)])
    async def one_model(name: str) -> dict[str, Any]:
        return _model_entry(find(name).name)

    @app.post("/v1/chat/completions", dependencies=[Depends(authorize)])
    async def chat(request: Request) -> HttpResponse:
        with ExitStack() as stack:
            held = stack.enter_context(memory.hold())
            content = await _read_body(request, limits.max_body, held)
            body = ChatRequest.parse(content)
            model = find(body.model)
            _require_room(model.engine)
            is_remote = bool(limits.images.remote_hosts) and b"http" in content
            del content
            prompt_ids, images, sampling = await asyncio.get_running_loop().run_in_executor(
                fetching if is_remote else None, _prepare, model, body, limits
            )
            held.resize(sum(image.pixels.nbytes for image in images))
            job, pieces = _submit(model.engine, prompt_ids, images, sampling)
            stack.callback(job.cancelled.set)
            response = Response(model.name, len(prompt_ids), sampling)
            if body.stream:
                with_usage = body.stream_options is not None and body.stream_options.include_usage
                return EventStream(_events(pieces, response, with_usage), stack.pop_all())
            watch = asyncio.create_task(_watch(request, job))
            stack.callback(watch.cancel)
            return JSONResponse(response.whole([piece async for piece in pieces]))

    return app


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        events: The events.
        stack: Closed when they have been sent, or when the client has disconnected.
    """

    def __init__(self, events: AsyncIterator[str], stack: ExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stack:
            await super().__call__(scope, receive, send)


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    def respond(error: RequestError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        place = f"{request.method} {request.url.path}"
        message = f"{place}: {error.detail}; this server has /v1/chat/completions and /v1/models"
        return respond(RequestError(error.status_code, "unknown_url", message))

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> JSONResponse:
        return respond(RequestError(500, "internal_error", f"a bug: {type(error).__name__}"))


def _model_entry(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "vlm_sft"}


def _prepare(
    model: ServedModel, body: ChatRequest, limits: Limits
) -> tuple[list[int], list[ImageCrops], Sampling]:
    """Return token ids, images and sampling of a request.

    Raises:
        RequestError: The request cannot be answered.
    """
    sampling = body.sampling(limits)
    most = model.max_prompt_tokens
    # Tokenizing a text takes long; this one cannot fit, whatever its tokens are.
    if most is not None and body.num_characters > most * model.max_token_characters:
        raise _too_long(f"{body.num_characters:,} characters", most)
    try:
        conversation = as_conversation(body.prompt(limits.images))
        images = model.loaded.load_images(conversation)
        prompt_ids = model.loaded.prompt_ids(conversation, [image.layout for image in images])
    except UserError as error:
        raise RequestError(400, error.reason, str(error)) from None
    if most is None:
        return prompt_ids, images, sampling
    free = most + 1 - len(prompt_ids)
    if free < 1:
        raise _too_long(f"{len(prompt_ids):,} tokens", most)
    return prompt_ids, images, replace(sampling, max_tokens=min(sampling.max_tokens, free))


def _too_long(found: str, most: int) -> RequestError:
    return RequestError(
        400, "context_length_exceeded",
        f"the prompt has {found}, and the model {most + 1:,} positions",
    )  # fmt: skip


async def _read_body(request: Request, most: int, held: Held) -> bytes:
    """Return the body of a request.

    Raises:
        RequestError: It is not JSON, longer than `most` bytes, too slow, or there is no memory
            for it.
    """
    refusal: RequestError | None = None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # other types can be sent by any web page without being asked
        refusal = RequestError(415, "invalid_request", "expected Content-Type: application/json")
    if int(request.headers.get("content-length") or 0) > most:
        refusal = _too_large(most)
    body = bytearray()
    loop = asyncio.get_running_loop()
    seconds = BODY_SECONDS if refusal is None else DISCARD_SECONDS
    try:
        async with asyncio.timeout(seconds) as timer:
            async for part in request.stream():
                if refusal is not None:
                    continue
                body += part
                try:
                    if len(body) > most:
                        raise _too_large(most)
                    held.resize(len(body))
                except RequestError as error:
                    refusal = error
                    body.clear()
                    timer.reschedule(min(timer.when() or 0, loop.time() + DISCARD_SECONDS))
    except TimeoutError:
        refusal = refusal or RequestError(
            408, "request_too_slow", f"the request did not arrive within {BODY_SECONDS:.0f} seconds"
        )
    except ClientDisconnect:
        refusal = RequestError(400, "disconnected", "the client has disconnected")
    if refusal is not None:
        raise refusal
    return bytes(body)


def _too_large(most: int) -> RequestError:
    return RequestError(
        413, "request_too_large", f"the request is longer than {most:,} bytes, the maximum here"
    )


async def _discard_body(request: Request) -> None:
    """Read the rest of a request: a client that is still sending would not see the response."""
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DISCARD_SECONDS):
            async for _ in request.stream():
                pass


def _require_room(engine: Engine) -> None:
    """Refuse a request before its images are decoded if it would be refused afterwards."""
    if engine.waiting >= engine.max_queue:
        raise _queue_full(engine)


def _queue_full(engine: Engine) -> RequestError:
    return RequestError(429, "queue_full", f"{engine.max_queue} requests are waiting; try again")


def _submit(
    engine: Engine, prompt_ids: list[int], images: Sequence[ImageCrops], sampling: Sampling
) -> tuple[Job, AsyncIterator[Piece]]:
    """Queue a request; return its job and the pieces of its response."""
    events: asyncio.Queue[Piece | Exception] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def emit(event: Piece | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server was ended by force
            loop.call_soon_threadsafe(events.put_nowait, event)

    job = Job(prompt_ids, images, sampling, emit)
    try:
        engine.submit(job)
    except QueueFull:
        raise _queue_full(engine) from None
    except Stopped:
        raise RequestError(503, "stopped", "the server is shutting down") from None
    return job, _pieces(job, events)


async def _pieces(job: Job, events: "asyncio.Queue[Piece | Exception]") -> AsyncIterator[Piece]:
    """Yield pieces until every choice is finished.

    Raises:
        RequestError: Generation failed.
    """
    unfinished = job.sampling.num_choices
    while unfinished:
        event = await events.get()
        if isinstance(event, Exception):
            raise RequestError(503, "generation_failed", f"generation failed: {event}")
        unfinished -= event.finish_reason is not None
        yield event


async def _events(
    pieces: AsyncIterator[Piece], response: Response, with_usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events."""
    found: list[Piece] = []
    try:
        for event in response.first():
            yield _event(event)
        async for piece in pieces:
            found.append(replace(piece, text="", logprobs=()))
            yield _event(response.part(piece))
        if with_usage:
            yield _event(response.last(found))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield _event(error.body())


async def _watch(request: Request, job: Job) -> None:
    """Cancel the job when the client disconnects."""
    while not await request.is_disconnected():
        await asyncio.sleep(DISCONNECT_SECONDS)
    job.cancelled.set()
    job.emit(RuntimeError("the client has disconnected"))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
