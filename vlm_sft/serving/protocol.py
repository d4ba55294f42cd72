"""Parse OpenAI chat-completions requests, and build the responses."""

import base64
import binascii
import io
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm_sft.errors import ImageError
from vlm_sft.serving.engine import MAX_LOGPROBS, Piece, Sampling, TokenLogprob
from vlm_sft.utils.image_paths import image_path

MAX_CHOICES: Final = 16
MAX_STOP_TEXTS: Final = 4
UNSUPPORTED: Final = (
    "tools", "tool_choice", "functions", "function_call", "logit_bias", "best_of", "min_p", "top_k",
    "repetition_penalty", "guided_json", "presence_penalty", "frequency_penalty",
)  # fmt: skip
"""Parameters that would change the response and are not implemented; they are refused."""
MIN_TEMPERATURE: Final = 1e-4
"""Smaller temperatures take the most likely token, as 0 does."""
MIN_TOP_P: Final = 1e-6


class RequestError(Exception):
    """A request that is refused, with its HTTP status.

    Attributes:
        status: HTTP status.
        code: Machine-readable name of the error.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def body(self) -> dict[str, Any]:
        """Return the body of the response, in OpenAI's form."""
        kind = "authentication_error" if self.status == 401 else "invalid_request_error"
        if self.status >= 429:
            kind = "rate_limit_error" if self.status == 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_body: Bytes of a request.
        max_images: Images of a request.
        max_pixels: Pixels of an image, by its header.
        max_tokens: Tokens of a response; also the default.
        image_dir: Folder below which `file://` images may be read; None: no files are read.
    """

    max_body: int = 32 * 2**20
    max_images: int = 8
    max_pixels: int = 50_000_000
    max_tokens: int = 1024
    image_dir: Path | None = None


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class _ImageUrl(_Model):
    url: str


class _Part(_Model):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: _ImageUrl | str | None = None


class _Message(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]


class _StreamOptions(_Model):
    include_usage: bool = False


class ChatRequest(_Model):
    """The body of a chat-completions request; see OpenAI's API reference for the fields."""

    model: str | None = None
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63 - MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: dict[str, Any] | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    logit_bias: Any = None
    best_of: Any = None
    min_p: Any = None
    top_k: Any = None
    repetition_penalty: Any = None
    guided_json: Any = None

    @classmethod
    def parse(cls, body: bytes) -> "ChatRequest":
        """Parse the JSON of a request.

        Raises:
            RequestError: It is not JSON, a field has a wrong value, or asks for something that is
                not supported.
        """
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"] if part not in ("str",))
            raise RequestError(
                400, "invalid_request", f"{place or 'body'}: {first['msg']}"
            ) from None
        names = [name for name in UNSUPPORTED if getattr(request, name)]
        if (request.response_format or {}).get("type", "text") != "text":
            names.append("response_format")
        if name := next(iter(names), None):
            raise RequestError(400, "unsupported_parameter", f"{name}: is not supported")
        return request

    def sampling(self, limits: Limits) -> Sampling:
        """Return how to generate.

        Raises:
            RequestError: More tokens than allowed, or too many stop texts.
        """
        wanted = self.max_completion_tokens or self.max_tokens
        if wanted is not None and wanted > limits.max_tokens:
            raise RequestError(
                400, "too_many_tokens",
                f"max_tokens: {wanted:,} is more than this server allows ({limits.max_tokens:,})",
            )  # fmt: skip
        temperature = self.temperature or 0.0
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOP_TEXTS or not all(stop):
            raise RequestError(
                400, "invalid_request", f"stop: expected up to {MAX_STOP_TEXTS} non-empty texts"
            )
        return Sampling(
            max_tokens=wanted or limits.max_tokens,
            temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
            top_p=max(self.top_p or 1.0, MIN_TOP_P),
            stop=tuple(stop),
            seed=self.seed,
            num_choices=self.n or 1,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def prompt(self, limits: Limits) -> list[dict[str, Any]]:
        """Return the messages in vlm_sft's form, with the bytes of the images in their places.

        Raises:
            RequestError: An image is malformed, too large, too many, or not allowed.
        """
        messages: list[dict[str, Any]] = []
        num_images = 0
        for number, message in enumerate(self.messages):
            role = "system" if message.role == "developer" else message.role
            if isinstance(message.content, str):
                messages.append({"role": role, "content": message.content})
                continue
            parts: list[dict[str, Any]] = []
            for part in message.content:
                if part.type == "text":
                    parts.append({"type": "text", "text": part.text or ""})
                    continue
                num_images += 1
                if num_images > limits.max_images:
                    raise RequestError(
                        400, "too_many_images",
                        f"messages: more than {limits.max_images} images, the maximum here",
                    )  # fmt: skip
                url = (
                    part.image_url.url if isinstance(part.image_url, _ImageUrl) else part.image_url
                )
                parts.append({"type": "image", "image": read_image(url or "", number, limits)})
            messages.append({"role": role, "content": _plain(parts)})
        if messages[-1]["role"] != "user":
            raise RequestError(400, "invalid_request", "messages: the last one must be the user's")
        return messages


def read_image(url: str, message: int, limits: Limits) -> bytes:
    """Return the bytes of an image that is given as a `data:` URI, or as a file if allowed.

    Remote addresses are never fetched: a request could reach hosts inside the server's network.

    Raises:
        RequestError: The image is malformed, too large, or elsewhere.
    """
    where = f"messages[{message}]: image_url"
    scheme = url[:20].partition(":")[0].lower()
    if scheme == "file" and limits.image_dir is not None:
        data = _read_file(url.partition("://")[2], where, limits.image_dir)
    elif scheme == "data":
        head, comma, payload = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestError(400, "invalid_image", f"{where}: expected data:image/...;base64,...")
        try:
            data = base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(400, "invalid_image", f"{where}: is not valid base64") from None
    else:
        allowed = "a data: URI" + (" or file://" if limits.image_dir else "")
        raise RequestError(
            400, "image_not_allowed",
            f"{where}: expected {allowed}; this server does not fetch other addresses",
        )  # fmt: skip
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = image.width * image.height
    except Exception:
        raise RequestError(400, "invalid_image", f"{where}: is not an image") from None
    if pixels > limits.max_pixels:
        raise RequestError(
            413, "image_too_large",
            f"{where}: {pixels:,} pixels, and the maximum here is {limits.max_pixels:,}",
        )  # fmt: skip
    return data


def _read_file(name: str, where: str, folder: Path) -> bytes:
    relative = name.removeprefix(f"{folder}/") if name.startswith("/") else name
    try:
        return image_path(folder, relative).read_bytes()
    except (ImageError, OSError, ValueError):
        raise RequestError(
            400, "image_not_allowed", f"{where}: no such image in the folder of this server"
        ) from None


def _plain(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return one text as a plain string: templates treat both forms alike."""
    if len(parts) == 1 and parts[0]["type"] == "text":
        return str(parts[0]["text"])
    return parts


class Response:
    """Builds the JSON of one response, streamed or whole."""

    def __init__(self, model: str, num_prompt_tokens: int, sampling: Sampling) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model,
        }  # fmt: skip
        self._num_prompt_tokens = num_prompt_tokens
        self._sampling = sampling

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the body of a response that is not streamed."""
        choices = []
        for number in range(self._sampling.num_choices):
            own = [piece for piece in pieces if piece.choice == number]
            text = "".join(piece.text for piece in own)
            choice = {
                "index": number,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._logprobs([item for piece in own for item in piece.logprobs]),
                "finish_reason": own[-1].finish_reason,
            }
            choices.append(choice)
        return {
            **self._head, "object": "chat.completion", "choices": choices,
            "usage": self.usage(pieces),
        }  # fmt: skip

    def first(self, choice: int) -> dict[str, Any]:
        """Return the event that begins a choice."""
        return self._chunk(choice, {"role": "assistant", "content": ""}, None, ())

    def part(self, piece: Piece) -> dict[str, Any]:
        """Return the event of a piece."""
        delta = {"content": piece.text} if piece.text else {}
        return self._chunk(piece.choice, delta, piece.finish_reason, piece.logprobs)

    def last(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the event with the usage, which has no choices."""
        return {
            **self._head, "object": "chat.completion.chunk", "choices": [],
            "usage": self.usage(pieces),
        }  # fmt: skip

    def usage(self, pieces: Sequence[Piece]) -> dict[str, int]:
        """Return the numbers of tokens."""
        tokens: dict[int, int] = {}
        for piece in pieces:
            tokens[piece.choice] = max(tokens.get(piece.choice, 0), piece.num_tokens)
        generated = sum(tokens.values())
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._num_prompt_tokens + generated,
        }

    def _chunk(
        self, choice: int, delta: dict[str, Any], reason: str | None,
        logprobs: Sequence[TokenLogprob],
    ) -> dict[str, Any]:  # fmt: skip
        found = {
            "index": choice, "delta": delta, "logprobs": self._logprobs(logprobs),
            "finish_reason": reason,
        }  # fmt: skip
        return {**self._head, "object": "chat.completion.chunk", "choices": [found]}

    def _logprobs(self, found: Sequence[TokenLogprob]) -> Mapping[str, Any] | None:
        if self._sampling.logprobs is None:
            return None
        return {"content": [_logprob(item) for item in found], "refusal": None}


def _logprob(item: TokenLogprob) -> dict[str, Any]:
    def entry(token: str, value: float) -> dict[str, Any]:
        return {"token": token, "logprob": value, "bytes": list(token.encode())}

    return {
        **entry(item.token, item.logprob),
        "top_logprobs": [entry(token, value) for token, value in item.top],
    }
