"""Ask through a server's batch API: one file of many requests, answered within a day, for less.

A batch is recorded before it is created and carries our own key, so that after a kill at any moment
the next start finds it at the server instead of submitting it again.
"""

import asyncio
import hashlib
import itertools
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from data_tools.instruct.config import TeacherConfig
from data_tools.instruct.generate.teachers.batch_log import BatchLog, OpenBatch
from data_tools.instruct.generate.teachers.cancellation import Cancellation
from data_tools.instruct.generate.teachers.chat import ChatTeacher, refusal
from data_tools.instruct.generate.teachers.client import Key, addresses, make_client
from data_tools.instruct.generate.teachers.completions import (
    NotAnAnswer,
    answer_of,
    body_of,
    printable,
    read_completion,
)
from data_tools.instruct.generate.teachers.faults import (
    LONGEST_WAIT,
    Fault,
    fault_of,
    fault_of_status,
)
from data_tools.instruct.generate.teachers.rate_limit import backoff
from data_tools.instruct.generate.teachers.spending import LimitReached, Spending, Usage, most
from data_tools.instruct.plan.prompts import messages
from data_tools.instruct.schema import Answer, Failure, Request
from vlm_sft.errors import UserError

if TYPE_CHECKING:
    from openai.types import Batch

Record = Callable[[Answer | Failure], None]
Result = TypeVar("Result")

_LINE_BYTES: Final = 1 << 16
"""Largest size of the results, in bytes per request of a batch."""
_MOST_BYTES: Final = 150 << 20
"""Largest size of the requests of a batch, in bytes; OpenAI accepts 200 MB."""
_CALL_SECONDS: Final = 1800.0
"""Timeout of a call; files of requests and results are large."""
_ENDED: Final = ("completed", "failed", "expired", "cancelled")


class BatchTeacher:
    """Submits requests as batches and fetches the results."""

    def __init__(
        self,
        config: TeacherConfig,
        templates: Mapping[str, Any],
        spending: Spending,
        cancellation: Cancellation,
        *,
        seed: int,
        found: Path,
        batches: Path,
    ) -> None:
        """Validate address and key, and read which batches are open."""
        self._config, self._templates, self._seed = config, templates, seed
        self._spending, self._cancellation = spending, cancellation
        self._urls = addresses(config)
        if len(self._urls) > 1:
            raise UserError(
                f"{config.section}.base_url: batches are kept by one server; give one address"
            )
        self._key = Key(config, self._urls)
        most_bytes = config.max_answer_bytes + config.batch_size * _LINE_BYTES
        self._client = make_client(self._urls[0], self._key, config, most_bytes)
        self._chat = ChatTeacher(config, templates, spending, cancellation, seed=seed, found=found)
        self._log = BatchLog(batches)

    async def fill(self, pending: Iterator[Request], record: Record) -> None:
        """Find open batches, submit the rest, and wait for all results.

        Raises:
            UserError: The server refuses batches or the key.
            LimitReached: All results are in; a limit kept the rest from being submitted.
            Cancelled: The run was asked to stop; batches continue at the server, and the next
                start fetches their results.
        """
        for batch in list(self._log.open.values()):
            if batch.name is None:
                await self._look_for(batch)
        waiting = {request for batch in self._log.open.values() for request in batch.samples}
        left = (request for request in pending if request.id not in waiting)
        limited = not await self._submit(left)
        while self._log.open:
            for batch in list(self._log.open.values()):
                await self._look_at(batch, record)
            if self._log.open:
                await self._cancellation.sleep(self._config.poll_seconds)
        if limited:
            raise LimitReached

    async def close(self) -> None:
        """Close connections and files."""
        await self._client.close()
        await self._chat.close()
        self._log.close()

    async def _submit(self, left: Iterator[Request]) -> bool:
        """Submit what fits within the limits; return whether that is everything."""
        for first in left:
            request_format = await self._chat.request_format(first)
            lines: list[bytes] = []
            samples: dict[str, str] = {}
            upper, size = Usage(), 0
            for request in itertools.chain([first], left):
                schema = self._templates[request.template]["answer_schema"]
                body = body_of(request, messages(request, self._templates), schema, request_format)
                if not self._spending.fits(upper + most(body, self._config.prices)):
                    await self._create(lines, samples, upper)
                    return False
                samples[request.id] = request.sample_id
                upper += most(body, self._config.prices)
                lines.append(_line(request.id, body))
                size += len(lines[-1])
                if len(lines) == self._config.batch_size or size > _MOST_BYTES:
                    break
            await self._create(lines, samples, upper)
        return True

    async def _create(self, lines: list[bytes], samples: dict[str, str], upper: Usage) -> None:
        self._cancellation.check()
        if not lines or not self._spending.reserve_now("batch", upper):
            return
        digest = hashlib.sha256(" ".join(samples).encode()).hexdigest()[:32]
        batch = OpenBatch(f"{digest}-{self._log.number}", samples, upper)
        self._log.planned(batch)
        upload = ("requests.jsonl", b"".join(lines))
        file = await self._call(
            batch.key, lambda: self._client.files.create(file=upload, purpose="batch")
        )
        create = self._client.batches.create
        created = await self._call(
            batch.key,
            lambda: create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h",
                metadata={"key": batch.key},
            ),
            before_again=partial(self._find, batch.key),
        )  # fmt: skip
        self._log.created(batch, _name_of(created))

    async def _look_for(self, batch: OpenBatch) -> None:
        """Ask the server whether a batch exists whose submission was interrupted."""
        found = await self._call(batch.key, partial(self._find, batch.key))
        if found is not None:
            self._log.created(batch, _name_of(found))
            return
        self._log.finished(batch, "never created")
        self._spending.settle_now("batch", batch.most, Usage())

    async def _find(self, key: str) -> "Batch | None":
        async for batch in self._client.batches.list(limit=100):
            if (batch.metadata or {}).get("key") == key:
                return batch
        return None

    async def _look_at(self, batch: OpenBatch, record: Record) -> None:
        name = batch.name or ""
        state = await self._call(batch.key, lambda: self._client.batches.retrieve(name))
        if state.status not in _ENDED:
            return
        missing, spent = dict(batch.samples), Usage()
        for file in (state.output_file_id, state.error_file_id):
            if file is not None:
                for values in await self._call(batch.key, partial(self._results_in, file)):
                    sample = missing.pop(str(values.get("custom_id")), None)
                    if sample is not None:  # else it was not requested, or is a duplicate
                        outcome = self._outcome(values, sample)
                        spent += _spent(outcome)
                        record(outcome)
        message = f"the batch {printable(name, 100)} ended as {state.status} without it"
        why = _errors_of(state)
        message += f": {printable(self._key.removed_from(why))}" if why else ""
        for request, sample in missing.items():
            record(Failure(request=request, sample_id=sample, reason="expired", message=message))
        possible = batch.most.tokens * 2 + len(batch.samples) * 10_000
        self._spending.settle_now(
            "batch", batch.most, spent if spent.tokens <= possible else batch.most
        )
        self._log.finished(batch, state.status)

    async def _results_in(self, file: str) -> list[dict[str, Any]]:
        results = []
        for line in (await self._client.files.content(file)).content.splitlines():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                continue  # its request is reported as missing
            if isinstance(values, dict):
                results.append(values)
        return results

    def _outcome(self, values: dict[str, Any], sample: str) -> Answer | Failure:
        request = str(values["custom_id"])  # it was found among the batch's samples
        response, error = values.get("response"), values.get("error")
        if not isinstance(response, dict):
            details = error if isinstance(error, dict) else {}
            words = printable(
                self._key.removed_from(f"{details.get('code')}: {details.get('message')}")
            )
            reason = "expired" if details.get("code") == "batch_expired" else "server_error"
            return Failure.model_validate(
                {"request": request, "sample_id": sample, "reason": reason, "message": words}
            )
        body, status = response.get("body"), response.get("status_code")
        if status == 200:
            try:
                reply = read_completion(body, self._key.removed_from)
            except NotAnAnswer as wrong:
                return Fault("not_an_answer", str(wrong)).failure(request, sample, 1)
            return answer_of(request, reply, "batch", self._config.prices)
        refused = body.get("error") if isinstance(body, dict) else None
        fault = fault_of_status(_status_of(status), {}, refused, self._key)
        if fault.policy:
            return Answer(request=request, teacher="batch", text="", finish="content_filter", usd=0)
        return fault.failure(request, sample, 1)

    async def _call(
        self,
        key: str,
        call: Callable[[], Awaitable[Result]],
        before_again: Callable[[], Awaitable[Result | None]] | None = None,
    ) -> Result:
        """Return the result of a call, retried where that can help."""
        for attempt in itertools.count(1):
            try:
                if before_again is not None and attempt > 1:
                    found = await before_again()
                    if found is not None:
                        return found
                async with asyncio.timeout(_CALL_SECONDS):
                    return await call()
            except Exception as error:
                fault = fault_of(error, self._key)
            if not fault.retry or attempt == self._config.attempts:
                raise refusal(fault, self._urls, self._config.section)
            pause = backoff(self._config.backoff_seconds, attempt, self._seed, key)
            wait = pause if fault.wait is None else min(fault.wait, LONGEST_WAIT)
            await self._cancellation.sleep(wait)
        raise AssertionError("the loop above has no end")


def _status_of(value: Any) -> int:
    """Return an HTTP status, or 500 if the value is not one."""
    is_status = isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 999
    return value if is_status else 500


def _name_of(batch: "Batch") -> str:
    """Return the server's id of a batch, which becomes part of URLs and of a file.

    Raises:
        UserError: It is not usable as a name.
    """
    name: Any = batch.id
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}", name):
        raise UserError(
            "the server created a batch without a usable id, unlike OpenAI's batch API",
            code="teacher_refused",
        )
    return name


def _errors_of(batch: "Batch") -> str:
    """Return the errors that a server reports for a whole batch."""
    found: Any = getattr(batch.errors, "data", None)
    if not isinstance(found, list):
        return ""
    return "; ".join(str(getattr(error, "message", None) or "")[:300] for error in found[:5])


def _line(request: str, body: dict[str, Any]) -> bytes:
    url = "/v1/chat/completions"
    values = {"custom_id": request, "method": "POST", "url": url, "body": body}
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _spent(outcome: Answer | Failure) -> Usage:
    if isinstance(outcome, Failure):
        return Usage(requests=1)
    return Usage(1, outcome.tokens_in + outcome.tokens_out, outcome.usd or 0.0)
