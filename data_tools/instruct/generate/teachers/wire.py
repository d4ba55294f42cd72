"""What goes over the wire: the body of a request, and a completion read with suspicion."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from data_tools.instruct.config import PricesConfig
from data_tools.instruct.schema import Answer, Request

MOST_TOKENS: Final = 10_000_000
"""Of one prompt or answer; no model takes so many, and larger numbers are no counts."""
_MOST_LETTERS: Final = 500
"""Of a model's name or a finish reason."""
LENGTHS: Final = ("max_tokens", "max_completion_tokens")
"""The two names that servers know the limit of an answer by."""


class NotAnAnswer(Exception):
    """A response without error that is no completion; says what is wrong."""


@dataclass(frozen=True)
class Dialect:
    """How a server wants to be asked.

    Attributes:
        structured: What holds it to JSON.
        length: Its name for the limit of an answer.
    """

    structured: str = "none"
    length: str = LENGTHS[0]


@dataclass(frozen=True)
class Reply:
    """A completion.

    Attributes:
        text: Untouched; of a refusal by the server's own means, the refusal.
        finish: The server's reason, or `refusal`.
        tokens_known: Whether the server told its counts of tokens.
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
    request: Request, messages: list[dict[str, str]], schema: dict[str, Any], dialect: Dialect
) -> dict[str, Any]:
    """The body to send: the request's own parameters, all of them, and how JSON is asked for."""
    body: dict[str, Any] = {"messages": messages, **request.parameters}
    if dialect.length != LENGTHS[0] and LENGTHS[0] in body:
        body[dialect.length] = body.pop(LENGTHS[0])
    if dialect.structured == "json_schema":
        form = {"name": "answer", "strict": True, "schema": strict(schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    elif dialect.structured == "json_object":
        body["response_format"] = {"type": "json_object"}
    return body


def length_of(body: dict[str, Any]) -> int:
    """The most tokens that the body allows the answer."""
    return int(next((body[name] for name in LENGTHS if name in body), 0))


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as strict servers want it: every key required, no other allowed, no defaults."""

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
    """The completion in a response's JSON; every text in it goes through `clean`.

    Raises:
        NotAnAnswer: It is none.
    """
    if not isinstance(document, dict):
        raise NotAnAnswer("the response is no JSON object")
    choices = document.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise NotAnAnswer("the response has not exactly one choice")
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
            raise NotAnAnswer(f"{name} is longer than {_MOST_LETTERS} letters")
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
    """A response's JSON.

    Raises:
        NotAnAnswer: It says or shows that it is something else.
    """
    if "json" not in content_type.lower():
        kind = printable(content_type.split(";")[0], 80)
        raise NotAnAnswer(f"the response is {kind!r} and not JSON")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise NotAnAnswer("the response is broken JSON") from None


def printable(text: str, most: int = 300) -> str:
    """Foreign text on one line, safe for a terminal, not longer than `most` letters."""
    text = text[: 20 * most]
    safe = "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))
    return safe if len(safe) <= most else safe[:most] + "..."


def answer_of(request: str, reply: Reply, teacher: Any, prices: PricesConfig | None) -> Answer:
    """The reply as it is recorded."""
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
    """US dollars; None without prices."""
    if prices is None:
        return None
    cached = prices.input if prices.cached is None else prices.cached
    plain = tokens_in - tokens_cached
    return (plain * prices.input + tokens_cached * cached + tokens_out * prices.output) / 1e6


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise NotAnAnswer(f"{what} is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise NotAnAnswer(f"{what} holds what is no text (half a surrogate pair)") from None
    return value


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    if value is None:
        return None
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count or not 0 <= value <= MOST_TOKENS:
        raise NotAnAnswer(f"{name} is no count of tokens from 0 to {MOST_TOKENS:,}")
    return value
