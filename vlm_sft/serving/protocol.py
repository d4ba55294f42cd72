"""Parse OpenAI chat-completions requests, and build the responses."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm_sft.serving.engine import MAX_LOGPROBS, Piece, Sampling, TokenLogprob
from vlm_sft.serving.errors import RequestError
from vlm_sft.serving.images import ImageLimits, ImageReader

MAX_CHOICES: Final = 16
MAX_STOP_TEXTS: Final = 4
IGNORED: Final = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
     "prompt_cache_retention", "parallel_tool_calls")
)  # fmt: skip
"""Parameters that are accepted without an effect: none of them would change the response."""
NEUTRAL: Final[Mapping[str, Sequence[Any]]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,),
    "top_k": (-1, 0), "min_p": (0,), "best_of": (1,), "tools": ([],), "functions": ([],),
    "tool_choice": ("none",), "function_call": ("none",), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip
"""Values of parameters that are not implemented which leave the response as it is."""
MIN_TEMPERATURE: Final = 1e-4
"""Smaller temperatures take the most likely token, as 0 does."""
MIN_TOP_P: Final = 1e-6


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_body: Bytes of a request.
        max_tokens: Tokens of a response; also the default.
        max_memory: Bytes of the bodies and images of all requests together.
        images: Which images it may have.
    """

    max_body: int = 32 * 2**20
    max_tokens: int = 1024
    max_memory: int = 2**30
    images: ImageLimits = field(default_factory=ImageLimits)


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class _ImageUrl(_Model):
    url: str


class _Part(_Model):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: _ImageUrl | str | None = None

    @property
    def url(self) -> str:
        """The address of an image part; empty if it has none."""
        found = self.image_url
        return (found.url if isinstance(found, _ImageUrl) else found) or ""


class _Message(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]


class _StreamOptions(_Model):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of a chat-completions request; see OpenAI's API reference for the fields."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

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

    @classmethod
    def parse(cls, body: bytes) -> "ChatRequest":
        """Parse the JSON of a request.

        Raises:
            RequestError: It is not JSON, a field has a wrong value, or a parameter that would
                change the response is not supported.
        """
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"] if part not in ("str",))
            raise RequestError(
                400, "invalid_request", f"{place or 'body'}: {first['msg']}"
            ) from None
        for name, value in (request.model_extra or {}).items():
            if value is None or name in IGNORED or value in NEUTRAL.get(name, ()):
                continue
            raise RequestError(400, "unsupported_parameter", f"{name}: is not supported")
        if request.top_logprobs and not request.logprobs:
            raise RequestError(400, "invalid_request", "top_logprobs: needs logprobs: true")
        return request

    @property
    def num_characters(self) -> int:
        """Characters of the text of all messages."""
        contents = [message.content for message in self.messages]
        return sum(
            len(content) if isinstance(content, str) else sum(len(p.text or "") for p in content)
            for content in contents
        )

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

    def prompt(self, limits: ImageLimits) -> list[dict[str, Any]]:
        """Return the messages in vlm_sft's form, with the bytes of the images in their places.

        Raises:
            RequestError: An image is malformed, too large, too many, or not allowed.
        """
        messages: list[dict[str, Any]] = []
        reader = ImageReader(limits)
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
                image = reader.read(part.url, f"messages[{number}]: image_url")
                parts.append({"type": "image", "image": image})
            messages.append({"role": role, "content": _plain(parts)})
        if messages[-1]["role"] != "user":
            raise RequestError(400, "invalid_request", "messages: the last one must be the user's")
        return messages


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

    def first(self) -> list[dict[str, Any]]:
        """Return the events that begin the choices."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(i, delta, None, ()) for i in range(self._sampling.num_choices)]

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
        # A part of a character has no text of its own, and its bytes are not known here.
        whole = "\ufffd" not in token
        return {"token": token, "logprob": value, "bytes": list(token.encode()) if whole else None}

    return {
        **entry(item.token, item.logprob),
        "top_logprobs": [entry(token, value) for token, value in item.top],
    }
