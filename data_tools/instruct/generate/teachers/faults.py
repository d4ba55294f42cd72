"""Classify what can go wrong with an attempt, and whether a retry can help."""

import email.utils
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from data_tools.instruct.generate.teachers.client import Key, TooLong
from data_tools.instruct.generate.teachers.completions import NotAnAnswer, printable
from data_tools.instruct.schema import Failure

Reason = Literal[
    "rate_limited", "server_error", "timeout", "connection", "too_long", "not_an_answer", "refused"
]

LONGEST_WAIT: Final = 600.0
"""Longest `Retry-After` that is waited for, in seconds; with a longer one the request fails."""

_POLICY_CODES: Final = ("content_filter", "content_policy_violation", "content_policy")


@dataclass(frozen=True)
class Fault:
    """Why an attempt brought no answer.

    Attributes:
        retry: Whether a retry can help.
        wait: Seconds that the server asks to wait.
        free: Whether the server certainly charged nothing.
        fatal: Whether every other request would fail too.
        policy: Whether the server refused the content of the request.
        parameter: The parameter that the server names in its error.
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
        """Return the failure of a request whose last attempt ended like this."""
        return Failure(
            request=request, sample_id=sample_id, reason=self.reason, message=self.message,
            status=self.status, attempts=attempts,
        )  # fmt: skip


def fault_of(error: Exception, key: Key) -> Fault:
    """Return the fault for an exception that an attempt raised.

    A malformed response can make the client raise almost anything; it must fail one request only.
    """
    import httpx2
    import openai

    if isinstance(error, NotAnAnswer):
        return Fault("not_an_answer", str(error))
    if isinstance(error, TooLong):
        return Fault("too_long", str(error))
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Fault("timeout", "no complete answer within timeout_seconds")
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
    return Fault("not_an_answer", f"the response cannot be parsed as an answer ({name})")


def fault_of_status(status: int, headers: Mapping[str, str], body: Any, key: Key) -> Fault:
    """Return the fault for an HTTP error status; `body` is the error as received."""
    error = body if isinstance(body, dict) else {"message": body or ""}
    status = status if 100 <= status <= 999 else 500
    words = printable(key.removed_from(str(error.get("message") or "")))
    message = f"the server returned {status}" + (f": {words}" if words else "")
    code, parameter = str(error.get("code") or ""), error.get("param")
    fault = Fault("refused", message, status=status, retry=False, free=True)
    wait = retry_after(headers)
    if 300 <= status < 400:
        elsewhere = "; redirects are not followed, because the key would be sent there"
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
    """Return the seconds of `Retry-After`, given as a number or a date, or None."""
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
