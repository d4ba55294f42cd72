"""Build the body of a chat-completions request, and validate the response."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from data_tools.instruct.config import PricesConfig
from data_tools.instruct.schema import Answer, Request

MOST_TOKENS: Final = 10_000_000
"""Largest number of tokens of a prompt or answer that is believed."""
_MOST_LETTERS: Final = 500
"""Longest model name or finish reason that is accepted, in characters."""
LENGTHS: Final = ("max_tokens", "max_completion_tokens")
"""The two names of the parameter that limits the length of an answer."""


class NotAnAnswer(Exception):
    """A successful response that is not a completion; the message says why."""


@dataclass(frozen=True)
class RequestFormat:
    """The parameters that a server accepts.

    Attributes:
        structured: How JSON is requested: `json_schema`, `json_object` or `none`.
        length: The name of the parameter that limits the length of an answer.
    """

    structured: str = "none"
    length: str = LENGTHS[0]


@dataclass(frozen=True)
class Reply:
    """A completion.

    Attributes:
        text: The message as received; if the server refused (`message.refusal`), the refusal.
        finish: The finish reason, or `refusal`.
        tokens_known: Whether the response has token counts.
    """

    text: str
    finish: str | None
    model: str
    fingerprint: str | None
    tokens_in: int
    tokens_cached: int
    tokens_out: int
    tokens_known: bool


def body_of(
    request: Request,
    messages: list[dict[str, str]],
    schema: dict[str, Any],
    request_format: RequestFormat,
) -> dict[str, Any]:
    """Return the body to send: all parameters of the request, and how JSON is requested."""
    body: dict[str, Any] = {"messages": messages, **request.parameters}
    if request_format.length != LENGTHS[0] and LENGTHS[0] in body:
        body[request_format.length] = body.pop(LENGTHS[0])
    if request_format.structured == "json_schema":
        form = {"name": "answer", "strict": True, "schema": strict(schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    elif request_format.structured == "json_object":
        body["response_format"] = {"type": "json_object"}
    return body


def length_of(body: dict[str, Any]) -> int:
    """Return the largest number of tokens that the answer may have."""
    return int(next((body[name] for name in LENGTHS if name in body), 0))


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema in strict form: every key required, no others allowed, no defaults."""

    def tighten(node: Any) -> Any:
        if isinstance(node, list):
            return [tighten(item) for item in node]
        if not isinstance(node, dict):
            return node
        node = {key: tighten(value) for key, value in node.items() if key != "default"}
        if node.get("type") == "object":
            node |= {"required": list(node.get("properties", {})), "additionalProperties": False}
        return node

    return tighten(copy.deepcopy(schema))


def read_completion(document: Any, clean: Callable[[str], str]) -> Reply:
    """Return the completion in a response's JSON; every text in it goes through `clean`.

    Raises:
        NotAnAnswer: The response is not a completion.
    """
    if not isinstance(document, dict):
        raise NotAnAnswer("the response is not a JSON object")
    choices = document.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise NotAnAnswer("the response does not have exactly one choice")
    message, finish = choices[0].get("message"), choices[0].get("finish_reason")
    if not isinstance(message, dict):
        raise NotAnAnswer("the choice has no message")
    text, refusal = message.get("content"), message.get("refusal")
    if text is None and isinstance(refusal, str):
        text, finish = refusal, "refusal"
    if text is None and finish in ("content_filter", "length"):
        text = ""
    usage = document.get("usage")
    tokens_in, tokens_out = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    for name, value in (("finish_reason", finish), ("model", document.get("model"))):
        if isinstance(value, str) and len(value) > _MOST_LETTERS:
            raise NotAnAnswer(f"{name} is longer than {_MOST_LETTERS} characters")
    return Reply(
        text=clean(_text(text, "content")),
        finish=None if finish is None else clean(_text(finish, "finish_reason")),
        model=clean(_text(document.get("model") or "", "model")),
        fingerprint=clean(
            _text(document.get("system_fingerprint") or "", "fingerprint")[:_MOST_LETTERS]
        )
        or None,
        tokens_in=tokens_in or 0,
        tokens_cached=min(_count(details, "cached_tokens") or 0, tokens_in or 0),
        tokens_out=tokens_out or 0,
        tokens_known=tokens_in is not None and tokens_out is not None,
    )


def read_json(content: bytes, content_type: str) -> Any:
    """Return a response's JSON.

    Raises:
        NotAnAnswer: The content type or the content is not JSON.
    """
    if "json" not in content_type.lower():
        kind = printable(content_type.split(";")[0], 80)
        raise NotAnAnswer(f"the response is {kind!r} and not JSON")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise NotAnAnswer("the response is not valid JSON") from None


def printable(text: str, most: int = 300) -> str:
    """Return untrusted text on one line, safe for a terminal, at most `most` characters long."""
    text = text[: 20 * most]
    safe = "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))
    return safe if len(safe) <= most else safe[:most] + "..."


def answer_of(request: str, reply: Reply, teacher: Any, prices: PricesConfig | None) -> Answer:
    """Return the answer that is recorded for a reply."""
    usd = cost(reply.tokens_in, reply.tokens_cached, reply.tokens_out, prices)
    return Answer(
        request=request, teacher=teacher, text=reply.text, finish=reply.finish,
        model=reply.model, fingerprint=reply.fingerprint, tokens_in=reply.tokens_in,
        tokens_cached=reply.tokens_cached, tokens_out=reply.tokens_out,
        usd=usd if reply.tokens_known else None,
    )  # fmt: skip


def cost(
    tokens_in: int, tokens_cached: int, tokens_out: int, prices: PricesConfig | None
) -> float | None:
    """Return the cost in US dollars, or None without prices."""
    if prices is None:
        return None
    cached = prices.input if prices.cached is None else prices.cached
    plain = tokens_in - tokens_cached
    return (plain * prices.input + tokens_cached * cached + tokens_out * prices.output) / 1e6


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise NotAnAnswer(f"{what} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise NotAnAnswer(f"{what} is not valid Unicode (a lone surrogate)") from None
    return value


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    if value is None:
        return None
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count or not 0 <= value <= MOST_TOKENS:
        raise NotAnAnswer(f"{name} is not a number of tokens from 0 to {MOST_TOKENS:,}")
    return value
