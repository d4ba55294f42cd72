"""Connect to OpenAI-compatible servers: only to the configured host, and with bounded responses.

The client's own retries are off (`chat.py` reserves the cost of each attempt), redirects are not
followed (the key would be sent there), and proxies and passwords of the environment are ignored.
"""

import codecs
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from data_tools.instruct.config import TeacherConfig
from data_tools.instruct.generate.teachers.secrets import Remover
from vlm_sft.errors import UserError
from vlm_sft.utils.addresses import is_loopback
from vlm_sft.utils.libraries import import_extra

if TYPE_CHECKING:
    import httpx2
    import openai

OPENAI: Final = "https://api.openai.com/v1"
_HEADERS: Final = frozenset(
    (b"host", b"authorization", b"accept", b"accept-encoding", b"connection", b"user-agent",
     b"content-type", b"content-length", b"transfer-encoding", b"x-client-request-id")
)  # fmt: skip
_HEADER_NAME: Final = re.compile(rb"[^!#$%&'*+.^_`|~0-9A-Za-z-]")
_CHARSET: Final = re.compile(rb";\s*charset\s*=\s*\"?([^\s;\"]*)\"?", re.IGNORECASE)


class TooLong(Exception):
    """A response is longer than the limit, or compressed."""


class Key:
    """The API key of a server, which is never printed.

    Raises:
        UserError: The variable is not set although the server is not on this machine, or its value
            cannot be sent in a header.
    """

    def __init__(self, config: TeacherConfig, urls: list[str]) -> None:
        value = os.environ.get(config.api_key_env, "")
        here = all(is_loopback(_host(url)) for url in urls)
        if not value and not here:
            raise UserError(
                f"the environment variable {config.api_key_env} is not set; put the key of "
                f"{', '.join(urls)} into it, or name another one as "
                f"{config.section}.api_key_env",
                code="teacher_key",
            )
        if not all("!" <= letter <= "~" for letter in value):
            raise UserError(
                f"the environment variable {config.api_key_env} holds spaces, line breaks or "
                "non-ASCII characters, which a key cannot have; set it again without them",
                code="teacher_key",
            )
        self._value = value or "none"
        self.remover = Remover(value)

    def __repr__(self) -> str:
        return "Key(not shown)"

    def reveal(self) -> str:
        """Return the key, for the client only."""
        return self._value

    def removed_from(self, text: str) -> str:
        """Return the text without the key, in case a server has echoed it in some form."""
        return self.remover.from_text(text)


def addresses(config: TeacherConfig) -> list[str]:
    """Return the servers' addresses, validated.

    Raises:
        UserError: An address is not of the allowed form.
    """
    given = config.base_url or OPENAI
    urls = [given] if isinstance(given, str) else given
    if not urls:
        raise UserError(f"{config.section}.base_url: the list is empty; name a server")
    for url in urls:
        _check(url, config.section)
    return urls


def make_client(
    url: str, key: Key, config: TeacherConfig, most_bytes: int | None = None
) -> "openai.AsyncOpenAI":
    """Return a client for one server that reads at most `most_bytes` of a response.

    The default is `teacher.max_answer_bytes`.
    """
    library = import_extra("openai", "instruct")
    import httpx2  # comes with openai

    seconds = config.timeout_seconds
    timeout = httpx2.Timeout(seconds, connect=min(seconds, 10.0), pool=None)
    limits = httpx2.Limits(max_connections=config.concurrency + 4)
    http = httpx2.AsyncClient(
        transport=_bounded(limits, most_bytes or config.max_answer_bytes, key.remover),
        timeout=timeout,
        follow_redirects=False,
        trust_env=False,
    )
    # The key is also given as a header because OPENAI_CUSTOM_HEADERS would override the other one.
    headers = {"Authorization": f"Bearer {key.reveal()}", "Accept-Encoding": "identity"}
    client: openai.AsyncOpenAI = library.AsyncOpenAI(
        api_key=key.reveal(), base_url=url, max_retries=0, timeout=timeout, http_client=http,
        default_headers=headers,
    )  # fmt: skip
    return client


def _bounded(
    limits: "httpx2.Limits", most_bytes: int, remover: Remover
) -> "httpx2.AsyncBaseTransport":
    """Return a transport whose responses are bounded and do not contain the key.

    Everything a server sends passes here: status line, headers and body are cleaned before the
    client, its logs and its errors see them.
    """
    import httpx2

    async def body(stream: httpx2.AsyncByteStream) -> bytes:
        pieces, seen = [], 0
        async for piece in stream:
            seen += len(piece)
            if seen > most_bytes:
                raise TooLong(f"the response is longer than {most_bytes:,} bytes")
            pieces.append(piece)
        return remover.from_bytes(b"".join(pieces))

    class BoundedTransport(httpx2.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            response = await super().handle_async_request(_plain(request))
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                await response.aclose()
                raise TooLong(
                    "the response is compressed although the request asked for an uncompressed one"
                )
            try:
                content = await body(response.stream)
            finally:
                await response.aclose()
            return httpx2.Response(
                status_code=response.status_code,
                headers=_plain_headers(response.headers.raw, remover),
                stream=httpx2.ByteStream(content),
                extensions=_plain_extensions(response.extensions, remover),
            )

    return BoundedTransport(limits=limits, trust_env=False)


def _plain_headers(
    headers: Iterable[tuple[bytes, bytes]], remover: Remover
) -> list[tuple[bytes, bytes]]:
    """Return a response's headers without the key, and without an unknown charset."""
    cleaned = [(remover.from_bytes(name), remover.from_bytes(value)) for name, value in headers]
    return [
        (_HEADER_NAME.sub(b"-", name), _known_charset(value))
        for name, value in cleaned
        if name.lower() not in (b"content-length", b"transfer-encoding")
    ]


def _known_charset(value: bytes) -> bytes:
    match = _CHARSET.search(value)
    if match is None:
        return value
    try:
        if len(match[1]) <= 40 and codecs.lookup(match[1].decode("ascii"))._is_text_encoding:
            return value
    except (LookupError, ValueError):
        pass
    return value[: match.start()]


def _plain_extensions(extensions: Mapping[str, Any], remover: Remover) -> dict[str, Any]:
    reason = extensions.get("reason_phrase")
    if not isinstance(reason, bytes):
        return dict(extensions)
    return {**extensions, "reason_phrase": remover.from_bytes(reason)}


def _plain(request: "httpx2.Request") -> "httpx2.Request":
    """Return the request with the headers that a server needs, and no others.

    The client adds facts about this machine and headers from the environment.
    """
    import httpx2

    kept = [(name, value) for name, value in request.headers.raw if name.lower() in _HEADERS]
    return httpx2.Request(
        request.method, request.url, headers=kept, stream=request.stream,
        extensions=request.extensions,
    )  # fmt: skip


def _check(url: str, section: str) -> None:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise _refused(section, "is not an address") from None
    if "@" in url:
        raise _refused(section, "holds a user name or password")  # and must not be printed
    shown = repr(f"{parts.scheme}://{host}") if host else "(not shown because it may hold a key)"
    if parts.scheme not in ("http", "https") or not host:
        raise _refused(section, f"{shown} is not an http address")
    if parts.query or parts.fragment:
        raise _refused(section, f"{shown} holds a query or fragment")
    if parts.scheme == "http" and not is_loopback(host):
        raise _refused(section, f"{shown} would send the key and the data unencrypted")


def _refused(section: str, what: str) -> UserError:
    return UserError(
        f"{section}.base_url {what}; give https://host/v1, or http:// for a server on this machine",
        code="teacher_address",
    )


def _host(url: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url).hostname or ""
