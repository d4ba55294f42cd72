"""Ask a judge model behind an OpenAI-compatible endpoint, within a budget, and resumably."""

import asyncio
import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from vlm_sft.errors import UserError
from vlm_sft.evaluation.judges.verdict_log import Reply, VerdictLog
from vlm_sft.utils.libraries import import_extra
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import read_text

PROMPTS: Final = ("single", "single_reference", "pair")
_FILLED: Final = re.compile(r"\{(\w+)\}")
_LONGEST_WAIT: Final = 120.0
_FREE: Final = ("rate_limited", "refused", "unreachable")
"""Failures for which a server charges nothing."""
_MAX_PROMPT_BYTES: Final = 1 << 20
_TOKENS_AROUND: Final = 200
"""Tokens that a chat template may add to a prompt; a token has at least one byte of text."""


@dataclass(frozen=True)
class JudgeOptions:
    """Who judges, and how much may be asked.

    Attributes:
        base_url: Address of the server, e.g. `http://127.0.0.1:8000/v1`.
        model: Name of the judge model.
        log: File of the replies; requests with a reply in it are not sent again.
        prompts: Folder with files that replace the built-in prompts; None for those.
        key_variable: Environment variable with the API key; None: no key is sent.
        usd_per_million: Prices of a million tokens of prompts and of replies.
        max_usd: Nothing is sent that might make the log's costs exceed this.
        max_tokens: Longest reply.
        temperature: 0 for the most probable reply.
        seed: Sent with each request.
        concurrency: Requests at a time.
        attempts: Attempts per request.
        timeout: Seconds of an attempt.
        backoff: Seconds before the second attempt, doubled for each further one.
    """

    base_url: str
    model: str
    log: Path
    prompts: Path | None = None
    key_variable: str | None = None
    usd_per_million: tuple[float, float] | None = None
    max_usd: float | None = None
    max_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    concurrency: int = 4
    attempts: int = 5
    timeout: float = 120.0
    backoff: float = 1.0


@dataclass(frozen=True)
class JudgeRequest:
    """One prompt for the judge; its id is the digest of all that determines the reply."""

    prompt: str
    id: str


@dataclass
class Asked:
    """What came of a set of requests.

    Attributes:
        replies: Replies by request id.
        failures: Requests without a reply after all attempts, by reason.
        not_sent: Requests that `max_usd` kept from being sent.
        usd: Money spent so far, as far as prices are known.
        new: Replies that were asked for in this run.
    """

    replies: dict[str, Reply] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    not_sent: int = 0
    usd: float = 0.0
    new: int = 0

    def as_dict(self, judge: JudgeOptions) -> dict[str, Any]:
        """Return counts for JSON."""
        return {
            "judge": judge.model,
            "judge_models": ", ".join(sorted({reply.model for reply in self.replies.values()})),
            "replies": len(self.replies),
            "new_replies": self.new,
            "failed_requests": sum(self.failures.values()),
            "not_sent_for_max_usd": self.not_sent,
            "usd": self.usd if judge.usd_per_million else None,
            "failures": dict(self.failures),
        }


def load_prompt(name: str, judge: JudgeOptions) -> str:
    """Return a prompt of `judge.prompts`, or the built-in one if the folder lacks it."""
    if judge.prompts is not None and (path := judge.prompts / f"{name}.txt").exists():
        return read_text(path, _MAX_PROMPT_BYTES)
    return files(__package__).joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8")


def fill(prompt: str, values: Mapping[str, str]) -> str:
    """Return the prompt with `{name}` replaced once; braces inside of values stay.

    Raises:
        UserError: The prompt lacks one of the names, or has an unknown one.
    """
    names = set(_FILLED.findall(prompt))
    if names != set(values):
        raise UserError(
            f"a judge prompt has the places {sorted(names)}, expected {sorted(values)}",
            code="wrong_input",
        )
    return _FILLED.sub(lambda found: values[found[1]], prompt)


def request_for(prompt: str, judge: JudgeOptions) -> JudgeRequest:
    """Return the request for a prompt, which the same settings give the same id."""
    parts = [judge.model, judge.max_tokens, judge.temperature, judge.seed, prompt]
    return JudgeRequest(prompt, hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32])


def ask(requests: Sequence[JudgeRequest], judge: JudgeOptions) -> Asked:
    """Return the judge's replies, those of an earlier run included.

    Raises:
        UserError: The server refuses every request (wrong key, model or address), or the log
            cannot be used.
    """
    unique = list({request.id: request for request in requests}.values())
    key = _key(judge)
    with VerdictLog(judge.log) as log:
        asked = asyncio.run(_Asker(judge, key, log).ask(unique))
        asked.replies = {r.id: log.replies[r.id] for r in unique if r.id in log.replies}
        asked.usd = log.usd
    return asked


class _Asker:
    """Sends the requests without a reply, at most `concurrency` at a time."""

    def __init__(self, judge: JudgeOptions, key: str, log: VerdictLog) -> None:
        self._judge, self._key, self._log = judge, key, log
        self._openai: Any = import_extra("openai", "scores")
        self._pause_until = 0.0

    async def ask(self, requests: Sequence[JudgeRequest]) -> Asked:
        asked = Asked()
        waiting = iter([r for r in requests if r.id not in self._log.replies])
        total = sum(r.id not in self._log.replies for r in requests)
        bar = track(range(total), total, "asking the judge")
        client = self._openai.AsyncOpenAI(
            base_url=self._judge.base_url, api_key=self._key or "none", max_retries=0,
            timeout=self._judge.timeout,
            http_client=self._openai.DefaultAsyncHttpxClient(
                follow_redirects=False, trust_env=False
            ),
        )  # fmt: skip

        async def work() -> None:
            for request in waiting:
                await self._ask_one(client, request, asked)
                next(bar, None)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._judge.concurrency, total)):
                    group.create_task(work())
        except* (UserError, OSError) as errors:
            raise errors.exceptions[0] from None
        finally:
            for _ in bar:
                pass
            await client.close()
        return asked

    async def _ask_one(self, client: Any, request: JudgeRequest, asked: Asked) -> None:
        most = self._cost(_most_tokens(request.prompt), self._judge.max_tokens) or 0.0
        reason = ""
        for attempt in range(1, self._judge.attempts + 1):
            await self._wait_for_server()
            # Nothing waits between here and the reservation: the others would spend the same money.
            limit = self._judge.max_usd
            if limit is not None and self._log.usd + most > limit:
                asked.not_sent += 1
                return
            self._log.sent(request.id, most)
            try:
                async with asyncio.timeout(self._judge.timeout):
                    completion = await self._send(client, request)
                reply = self._reply(request, completion)
            except Exception as error:
                reason, again, wait = self._fault(error)
                charged = 0.0 if reason in _FREE else most
                self._log.failed(request.id, reason, charged)
                if reason == "refused" and not asked.new:
                    raise self._refusal(error) from None
            else:  # a reply that cannot be written, as on a full disk, is not asked for again
                self._log.replied(request.id, reply)
                asked.new += 1
                return
            if not again or attempt == self._judge.attempts:
                break
            await self._back_off(request.id, attempt, wait)
        asked.failures[reason] += 1

    async def _send(self, client: Any, request: JudgeRequest) -> Any:
        return await client.chat.completions.create(
            model=self._judge.model,
            messages=[{"role": "user", "content": request.prompt}],
            temperature=self._judge.temperature,
            max_tokens=self._judge.max_tokens,
            seed=self._judge.seed,
            extra_headers={"X-Client-Request-Id": request.id},
        )

    def _reply(self, request: JudgeRequest, completion: Any) -> Reply:
        """Return the reply; raises if the response is not a completion."""
        choice = completion.choices[0]
        text = choice.message.content
        if text is not None and not isinstance(text, str):
            raise TypeError("the reply has no text")
        usage = completion.usage
        # A server that counts nothing is charged the most that the tokens can be.
        tokens_in = int(usage.prompt_tokens) if usage else _most_tokens(request.prompt)
        tokens_out = int(usage.completion_tokens) if usage else self._judge.max_tokens
        return Reply(
            text=self._without_key(text or ""),
            usd=self._cost(tokens_in, tokens_out),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            model=str(completion.model),
            finish=str(choice.finish_reason),
        )

    def _fault(self, error: Exception) -> tuple[str, bool, float | None]:
        """Return the reason, whether another attempt can help, and the wait that is asked for."""
        library = self._openai
        if isinstance(error, TimeoutError | library.APITimeoutError):
            return "timeout", True, None
        if isinstance(error, library.APIConnectionError):
            never_sent = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
            return "unreachable" if never_sent else "connection_lost", True, None
        if isinstance(error, library.APIStatusError):
            status = int(error.status_code)
            if status == 429:
                return "rate_limited", True, _retry_after(error.response.headers)
            if status in (408, 409) or status >= 500:
                return "server_error", True, _retry_after(error.response.headers)
            return "refused", False, None
        return "not_a_completion", True, None

    async def _wait_for_server(self) -> None:
        clock = asyncio.get_running_loop().time
        while (left := self._pause_until - clock()) > 0:  # others may prolong the pause
            await asyncio.sleep(left)

    async def _back_off(self, request: str, attempt: int, wait: float | None) -> None:
        if wait is not None:  # the server asks everybody to wait
            until = asyncio.get_running_loop().time() + min(wait, _LONGEST_WAIT)
            self._pause_until = max(self._pause_until, until)
            return
        spread = random.Random(f"{request}{attempt}").uniform(0.75, 1.25)
        await asyncio.sleep(min(_LONGEST_WAIT, self._judge.backoff * 2 ** (attempt - 1) * spread))

    def _cost(self, tokens_in: int, tokens_out: int) -> float | None:
        prices = self._judge.usd_per_million
        if prices is None:
            return None
        return (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6

    def _refusal(self, error: Exception) -> UserError:
        words = self._without_key(" ".join(str(error).split()))[:300]
        return UserError(
            f"{self._judge.base_url}: the judge's server refuses requests ({words}); fix "
            "--judge-url, --judge-model or the key",
            code="judge_refused",
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "(key)") if self._key else text


def _most_tokens(prompt: str) -> int:
    return len(prompt.encode()) + _TOKENS_AROUND


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None


def _key(judge: JudgeOptions) -> str:
    """Return the API key, or an empty text.

    Raises:
        UserError: The variable is not set, or the address would receive the key unencrypted.
    """
    parts = urlsplit(judge.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise UserError(
            "--judge-url is not an address like https://host/v1, without user name or password"
        )
    if judge.max_usd is not None and judge.usd_per_million is None:
        raise UserError("--max-usd needs the prices of tokens: give --usd-per-million IN OUT")
    if judge.key_variable is None:
        return ""
    key = os.environ.get(judge.key_variable, "")
    if not key:
        raise UserError(f"--judge-key-variable: {judge.key_variable} is not set or empty")
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(
            f"--judge-url http://{parts.hostname} would send the key unencrypted; use https"
        )
    return key
