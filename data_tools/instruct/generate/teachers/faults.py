"""What can go wrong with a sending, and what follows from it."""

import email.utils
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from data_tools.instruct.generate.teachers.client import Key, TooLong
from data_tools.instruct.generate.teachers.wire import NotAnAnswer, printable
from data_tools.instruct.schema import Failure

Reason = Literal[
    "rate_limited", "server_error", "timeout", "connection", "too_long", "not_an_answer", "refused"
]

LONGEST_WAIT: Final = 600.0
"""Seconds; a server that asks for a longer wait is asked again by the next start."""

_POLICY_CODES: Final = ("content_filter", "content_policy_violation", "content_policy")


@dataclass(frozen=True)
class Fault:
    """Why one sending brought no answer.

    Attributes:
        retry: Whether repeating it can help.
        wait: Seconds that the server asks to wait.
        free: Whether the server surely charged nothing.
        fatal: No other request would fare better.
        policy: The server holds the request's content to be against its rules.
        parameter: The parameter that the server complains about.
    """

    reason: Reason
    message: str
    status: int | None = None
    retry: bool = True
    wait: float | None = None
    free: bool = False
    fatal: bool = False
    policy: bool = False
    parameter: str | None = None

    def failure(self, request: str, sample_id: str, attempts: int) -> Failure:
        """The failure of a request that ended with this."""
        return Failure(
            request=request, sample_id=sample_id, reason=self.reason, message=self.message,
            status=self.status, attempts=attempts,
        )  # fmt: skip


def fault_of(error: Exception, key: Key) -> Fault:
    """Return the fault that an exception of a sending stands for.

    The client and the libraries below it raise whatever a strange response makes them stumble
    over; one bad reply is one failed request.
    """
    import httpx2
    import openai

    if isinstance(error, NotAnAnswer):
        return Fault("not_an_answer", str(error))
    if isinstance(error, TooLong):
        return Fault("too_long", str(error))
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Fault("timeout", "no whole answer within teacher.timeout_seconds")
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        if isinstance(cause, TooLong):
            return Fault("too_long", str(cause))
        never_sent = isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout)
        what = "cannot be reached" if never_sent else "dropped the connection"
        name = type(cause).__name__
        return Fault("connection", f"the server {what} ({name})", free=never_sent)
    if isinstance(error, openai.APIStatusError):
        return fault_of_status(error.status_code, error.response.headers, error.body, key)
    name = type(error).__name__
    return Fault("not_an_answer", f"the response cannot be read as an answer ({name})")


def fault_of_status(status: int, headers: Mapping[str, str], body: Any, key: Key) -> Fault:
    """The fault that a status other than success stands for; `body` is the error as it came."""
    told = body if isinstance(body, dict) else {"message": body or ""}
    status = status if 100 <= status <= 999 else 500
    words = printable(key.removed_from(str(told.get("message") or "")))
    message = f"the server says {status}" + (f": {words}" if words else "")
    code, parameter = str(told.get("code") or ""), told.get("param")
    fault = Fault("refused", message, status=status, retry=False, free=True)
    wait = retry_after(headers)
    if 300 <= status < 400:
        elsewhere = "; it points elsewhere, which is not followed, for the key would go there"
        return replace(fault, message=message + elsewhere, fatal=True)
    if status == 429:
        spent = code == "insufficient_quota"
        return replace(fault, reason="rate_limited", wait=wait, retry=not spent, fatal=spent)
    if code in _POLICY_CODES:
        return replace(fault, policy=True)
    if status in (401, 403, 404):
        return replace(fault, fatal=True)
    if status in (408, 409) or (status >= 500 and status != 501):
        return replace(fault, reason="server_error", wait=wait, retry=True)
    return replace(fault, parameter=parameter if isinstance(parameter, str) else None)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait: `Retry-After` as a number or a date."""
    value = headers.get("retry-after", "")[:100].strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            parsed = email.utils.parsedate_tz(value)
        except (ValueError, IndexError, TypeError):
            return None
        if parsed is None:
            return None
        try:
            seconds = email.utils.mktime_tz(parsed) - time.time()
        except (OverflowError, ValueError, OSError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
