"""Ask an OpenAI-compatible server one request at a time, through the `openai` client."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from data_tools.instruct.config import TeacherConfig
from data_tools.instruct.generate.teachers.cancellation import Cancellation
from data_tools.instruct.generate.teachers.client import Key, addresses, make_client
from data_tools.instruct.generate.teachers.completions import (
    NotAnAnswer,
    Reply,
    RequestFormat,
    answer_of,
    body_of,
    cost,
    length_of,
    read_completion,
    read_json,
)
from data_tools.instruct.generate.teachers.faults import LONGEST_WAIT, Fault, fault_of
from data_tools.instruct.generate.teachers.rate_limit import RateLimiter, backoff
from data_tools.instruct.generate.teachers.request_format import find_request_format
from data_tools.instruct.generate.teachers.spending import Spending, Usage, most
from data_tools.instruct.plan.prompts import messages
from data_tools.instruct.schema import Answer, Failure, Request
from vlm_sft.errors import UserError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_SLACK_TOKENS: Final = 10_000
"""Tokens that a server may add to a prompt."""
_REASONABLE_BYTES: Final = 3
"""Bytes of English text per token, for rate limiting only; spending limits assume one."""


class ChatTeacher:
    """Asks a server, with retries, rate limits and spending limits.

    Every attempt carries the request's id as `X-Client-Request-Id`.
    """

    def __init__(
        self,
        config: TeacherConfig,
        templates: Mapping[str, Any],
        spending: Spending,
        cancellation: Cancellation,
        *,
        seed: int,
        found: Path,
    ) -> None:
        """Validate address and key; `found` is the file that records what the server accepts."""
        if not config.model:
            raise UserError(f"{config.section}.model is not set; name a model of the server")
        self._config, self._templates, self._seed = config, templates, seed
        self._urls = addresses(config)
        self._key = Key(config, self._urls)
        self._clients = [make_client(url, self._key, config) for url in self._urls]
        self._spending, self._cancellation = spending, cancellation
        self._rate = RateLimiter(config, cancellation)
        self._found = found
        self._request_format: RequestFormat | None = None
        self._settling = asyncio.Lock()
        self._answered = False

    async def ask(self, request: Request) -> Answer | Failure:
        request_format = await self.request_format(request)
        schema = self._templates[request.template]["answer_schema"]
        body = body_of(request, messages(request, self._templates), schema, request_format)
        begun = time.monotonic()
        outcome, attempts = await self.attempts(request.id, body)
        if isinstance(outcome, Reply):
            self._answered = True
            answer = answer_of(request.id, outcome, "openai", self._config.prices)
        elif outcome.policy:  # a retry would be refused as well
            answer = Answer(
                request=request.id, teacher="openai", text="", finish="content_filter", usd=0.0
            )
        else:
            if outcome.reason == "refused" and not self._answered:
                raise refusal(outcome, self._urls, self._config.section)
            return outcome.failure(request.id, request.sample_id, attempts)
        seconds = round(time.monotonic() - begun, 3)
        return answer.model_copy(update={"attempts": attempts, "seconds": seconds})

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def request_format(self, request: Request) -> RequestFormat:
        """Return the parameters that the server accepts; the first call finds them out.

        Raises:
            UserError, LimitReached, Cancelled: As `attempts`.
        """
        async with self._settling:
            if self._request_format is None:
                self._request_format = await find_request_format(
                    self._config, self._urls, request.parameters, self._found, self.attempts
                )
        return self._request_format

    async def attempts(self, request: str, body: dict[str, Any]) -> tuple[Reply | Fault, int]:
        """Retry until there is a reply, a fault that a retry cannot fix, or no attempt left.

        Raises:
            UserError: A fault that every request would meet.
            LimitReached, Cancelled: Nothing more may be sent.
        """
        for attempt in range(1, self._config.attempts + 1):
            outcome = await self._attempt(request, body, attempt)
            if isinstance(outcome, Reply):
                return outcome, attempt
            if outcome.fatal:
                raise refusal(outcome, self._urls, self._config.section)
            too_long = (outcome.wait or 0) > LONGEST_WAIT
            if not outcome.retry or too_long or attempt == self._config.attempts:
                return outcome, attempt
            if outcome.wait is not None:
                self._rate.pause(outcome.wait)
            else:
                pause = backoff(self._config.backoff_seconds, attempt, self._seed, request)
                await self._cancellation.sleep(pause)
        raise AssertionError("at least one attempt is configured")

    async def _attempt(self, request: str, body: dict[str, Any], attempt: int) -> Reply | Fault:
        upper = most(body, self._config.prices)
        text = sum(len(message["content"]) for message in body["messages"])
        await self._rate.acquire(text // _REASONABLE_BYTES + length_of(body))
        self._cancellation.check()
        await self._spending.reserve(request, upper)
        spent = upper  # unless the actual cost becomes known
        try:
            outcome = await self._outcome(request, body, attempt)
            spent = self._spent(outcome, upper)
        finally:
            self._spending.settle(request, upper, spent)
        return outcome

    async def _outcome(self, request: str, body: dict[str, Any], attempt: int) -> Reply | Fault:
        """Return the reply or the fault, neither of which contains the key."""
        turn = sum(request.encode()) + attempt - 1
        client = self._clients[turn % len(self._clients)]
        try:
            async with asyncio.timeout(self._config.timeout_seconds):
                content, content_type = await _post(client, request, body)
            reply = read_completion(read_json(content, content_type), self._key.removed_from)
            _require_possible(reply, most(body, None).tokens)
            return reply
        except Exception as error:
            fault = fault_of(error, self._key)
        return fault

    def _spent(self, outcome: Reply | Fault, upper: Usage) -> Usage:
        if isinstance(outcome, Fault):
            return Usage(requests=1) if outcome.free else upper
        if not outcome.tokens_known:
            return upper
        tokens = outcome.tokens_in, outcome.tokens_cached, outcome.tokens_out
        usd = cost(*tokens, self._config.prices) or 0.0
        return Usage(1, outcome.tokens_in + outcome.tokens_out, usd)


def _require_possible(reply: Reply, most_tokens: int) -> None:
    """Refuse token counts that are impossible for the request; they would use up the limits."""
    count, limit = reply.tokens_in + reply.tokens_out, 2 * most_tokens + _SLACK_TOKENS
    if count > limit:
        raise NotAnAnswer(f"it reports {count:,} tokens, but at most {limit:,} are possible")


async def _post(client: "AsyncOpenAI", request: str, body: dict[str, Any]) -> tuple[bytes, str]:
    """Send a request; return the response's bytes and content type. Errors are the client's own."""
    rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
    response = await client.chat.completions.with_raw_response.create(
        model=body["model"],
        messages=body["messages"],
        extra_body=rest,
        extra_headers={"X-Client-Request-Id": request},
    )
    raw = response.http_response
    return raw.content, raw.headers.get("content-type", "")


def refusal(fault: Fault, urls: list[str], section: str) -> UserError:
    """Return the error that ends the run."""
    return UserError(
        f"{', '.join(urls)}: {fault.message}; every request would fail, so the run stops. Fix "
        f"{section}.base_url, {section}.model, the key or the parameters",
        code="teacher_refused",
    )
