"""The HTTP application: OpenAI's chat completions, models, health."""

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.responses import Response as HttpResponse

from vlm_sft.data.images import ImageCrops
from vlm_sft.errors import UserError
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.inference.prompts import as_conversation
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.positions import position_limit
from vlm_sft.serving.engine import Engine, Job, Piece, QueueFull, Sampling, Stopped
from vlm_sft.serving.protocol import ChatRequest, Limits, RequestError, Response

logger = logging.getLogger(__name__)

DISCONNECT_SECONDS = 0.5
"""Seconds between checks whether a client that waits is still connected."""


def make_app(
    loaded: LoadedModel, engine: Engine, name: str, limits: Limits, api_key: str | None
) -> FastAPI:
    """Return the application.

    Args:
        loaded: The model, for tokenizing prompts.
        engine: Generates; closed when the application shuts down.
        name: The model's name in the API.
        limits: What a request may ask for.
        api_key: The key that requests must carry as a bearer token; None: none.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="vlm_sft", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers)

    async def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise RequestError(401, "invalid_api_key", "wrong or missing API key")

    @app.get("/health")
    async def health() -> JSONResponse:
        status = {"status": "ok" if engine.alive else "failed", "waiting": engine.waiting}
        return JSONResponse(status, 200 if engine.alive else 503)

    @app.get("/v1/models", dependencies=[Depends(authorize)])
    async def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": 0, "owned_by": "vlm_sft"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions", dependencies=[Depends(authorize)])
    async def chat(request: Request) -> HttpResponse:
        body = ChatRequest.parse(await _read_body(request, limits.max_body))
        if body.model not in (None, "", name):
            raise RequestError(
                404,
                "model_not_found",
                f"model: there is no {body.model!r}; this server has {name!r}",
            )
        prompt_ids, images, sampling = await asyncio.to_thread(_prepare, loaded, body, limits)
        events: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Piece | Exception) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(prompt_ids, images, sampling, emit)
        try:
            engine.submit(job)
        except QueueFull:
            raise RequestError(
                429, "queue_full", f"{engine.max_queue} requests are waiting; try again"
            ) from None
        except Stopped:
            raise RequestError(503, "stopped", "the server is shutting down") from None
        response = Response(name, len(prompt_ids), sampling)
        pieces = _pieces(job, events)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            stream = _stream(pieces, response, sampling, job, with_usage)
            return StreamingResponse(stream, media_type="text/event-stream")
        watch = asyncio.create_task(_watch(request, job))
        try:
            found = [piece async for piece in pieces]
        finally:
            watch.cancel()
            job.cancelled.set()
        return JSONResponse(response.whole(found))

    return app


def _prepare(
    loaded: LoadedModel, body: ChatRequest, limits: Limits
) -> tuple[list[int], list[ImageCrops], Sampling]:
    """Return token ids, images and sampling of a request.

    Raises:
        RequestError: The request cannot be answered.
    """
    sampling = body.sampling(limits)
    try:
        conversation = as_conversation(body.prompt(limits))
        images = loaded.load_images(conversation)
        prompt_ids = loaded.prompt_ids(conversation, [image.layout for image in images])
    except UserError as error:
        raise RequestError(400, error.reason, str(error)) from None
    limit = position_limit(causal_lm(loaded.model.language_model))
    if limit is None:
        return prompt_ids, images, sampling
    free = limit.tokens - len(prompt_ids)
    if free < 1:
        raise RequestError(
            400, "context_length_exceeded",
            f"the prompt has {len(prompt_ids):,} tokens, and the model {limit.tokens:,} positions",
        )  # fmt: skip
    shortened = Sampling(**{**vars(sampling), "max_tokens": min(sampling.max_tokens, free)})
    return prompt_ids, images, shortened


async def _read_body(request: Request, most: int) -> bytes:
    """Return the body of a request.

    Raises:
        RequestError: It is longer than `most` bytes.
    """
    too_large = RequestError(
        413, "request_too_large", f"the request is longer than {most:,} bytes, the maximum here"
    )
    if int(request.headers.get("content-length") or 0) > most:
        raise too_large
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise too_large
    except ClientDisconnect:
        raise RequestError(400, "disconnected", "the client has disconnected") from None
    return bytes(body)


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


async def _stream(
    pieces: AsyncIterator[Piece],
    response: Response,
    sampling: Sampling,
    job: Job,
    with_usage: bool,
) -> AsyncIterator[str]:
    """Yield server-sent events; a client that disconnects cancels the job."""
    found: list[Piece] = []
    try:
        for choice in range(sampling.num_choices):
            yield _event(response.first(choice))
        async for piece in pieces:
            found.append(piece)
            yield _event(response.part(piece))
        if with_usage:
            yield _event(response.last(found))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield _event(error.body())
    finally:
        job.cancelled.set()


async def _watch(request: Request, job: Job) -> None:
    """Cancel the job when the client disconnects."""
    while not await request.is_disconnected():
        await asyncio.sleep(DISCONNECT_SECONDS)
    job.cancelled.set()
    job.emit(RuntimeError("the client has disconnected"))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
