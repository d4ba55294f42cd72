"""The file of a judge's replies: append-only, so that a killed run continues where it was."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.filesystem import lock, sync
from vlm_sft.utils.ownership import made_by

_HEADER: Final = "judge_replies"


@dataclass(frozen=True)
class Reply:
    """What the judge replied to one request.

    Attributes:
        text: The reply.
        usd: Its cost; None without prices.
        tokens_in: Tokens of the prompt, as the server counts them.
        tokens_out: Tokens of the reply.
        model: The model that the server names.
        finish: Why the reply ended: `stop`, `length`, `content_filter`, ...
    """

    text: str
    usd: float | None
    tokens_in: int
    tokens_out: int
    model: str
    finish: str


class VerdictLog:
    """Replies by request, and the money that is spent or may have been.

    Before a request is sent, its highest cost is recorded. A request without a recorded reply, as
    after a kill, counts with that cost, because the server may have answered it.

    Attributes:
        replies: Replies by request id.
        usd: Money spent by recorded replies and by attempts without one.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file and lock it.

        Raises:
            UserError: It is not such a file, is damaged, or another process uses it.
        """
        self.path = path
        self.replies: dict[str, Reply] = {}
        self.usd = 0.0
        self._open: dict[str, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if lock(self._descriptor, path, wait=False) == "held_elsewhere":
                raise UserError(f"{path}: another process asks a judge with this file; wait for it")
            self._read()
        except BaseException:
            os.close(self._descriptor)
            raise

    def sent(self, request: str, most_usd: float) -> None:
        """Record that a request is about to be sent."""
        self._append({"event": "sent", "id": request, "most_usd": most_usd})
        self._count_sent(request, most_usd)

    def replied(self, request: str, reply: Reply) -> None:
        """Record a reply."""
        self._append({"event": "reply", "id": request, **asdict(reply)})
        self._count_reply(request, reply)

    def failed(self, request: str, reason: str, usd: float) -> None:
        """Record that an attempt brought no reply, and what it may have cost."""
        self._append({"event": "failure", "id": request, "reason": reason, "usd": usd})
        self._count_failure(request, usd)

    def __enter__(self) -> "VerdictLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        sync(self._descriptor, self.path)
        os.close(self._descriptor)

    def _count_sent(self, request: str, most_usd: float) -> None:
        # A request that is sent again after a kill may have been charged before.
        self.usd += most_usd
        self._open[request] = most_usd

    def _count_reply(self, request: str, reply: Reply) -> None:
        self.usd -= self._open.pop(request, 0.0)
        self.usd += reply.usd or 0.0
        self.replies[request] = reply

    def _count_failure(self, request: str, usd: float) -> None:
        self.usd += usd - self._open.pop(request, 0.0)

    def _append(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(values).encode() + b"\n"
        written = os.write(self._descriptor, line)
        while written < len(line):
            written += os.write(self._descriptor, line[written:])

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", "replace").splitlines()
        if data and (not lines or f'"{_HEADER}"' not in lines[0]):
            if not data.startswith(b'{"' + _HEADER.encode()):
                raise UserError(f"{self.path}: is not a file of a judge's replies; give a new name")
            whole, lines = b"", []
        if len(whole) < len(data):
            echo(
                f"warning: {self.path}: the last line was cut when a process was ended; its "
                f"{len(data) - len(whole):,} bytes were removed"
            )
            os.ftruncate(self._descriptor, len(whole))
        if not lines:
            self._append({_HEADER: 1, "made_by": made_by("score")})
        for number, line in enumerate(lines[1:], 2):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}:{number}: is not a line of this file ({type(error).__name__}); "
                    "delete the line: its request is sent again",
                    code="verdicts_damaged",
                ) from None

    def _take(self, values: dict[str, Any]) -> None:
        event, request = values["event"], str(values["id"])
        if event == "sent":
            self._count_sent(request, float(values["most_usd"]))
        elif event == "reply":
            fields = {name: values[name] for name in Reply.__dataclass_fields__}
            self._count_reply(request, Reply(**fields))
        else:
            self._count_failure(request, float(values["usd"]))
