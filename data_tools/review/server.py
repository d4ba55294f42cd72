"""The review page's server: on this machine only, for the browser that was given its address."""

import hmac
import json
import secrets
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_tools.instruct.report.samples import view_sample
from data_tools.review.decisions import REASONS, Decision, EditedTurn, ReviewerLog
from data_tools.review.sources import Item, Source
from vlm_sft.errors import UserError
from vlm_sft.utils.html import render_fragment, render_page

HOST: Final = "127.0.0.1"
MAX_BODY: Final = 2**22
TIMEOUT_SECONDS: Final = 30
TEMPLATES: Final = ("data_tools.review", "data_tools.instruct.report")
SHOW: Final = {
    "all": "all samples",
    "unreviewed": "not reviewed yet",
    "reviewed": "reviewed",
    "rejected": "rejected by the verifier",
    "accepted": "accepted by the verifier",
    "unknown": "with unknown claims",
    "kept": "in kept.jsonl",
}
"""The filters."""

HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
}
"""Of every response; the page itself has a policy that allows its own script alone."""


class Choice(BaseModel):
    """What the page sends when a sample was decided about."""

    model_config = ConfigDict(extra="forbid")

    at: Annotated[int, Field(ge=0)]
    id: str
    digest: str
    decision: Literal["accept", "reject", "edit"]
    reason: str | None = None
    turns: tuple[EditedTurn, ...] | None = None


class Review:
    """What one reviewer sees and decides; the methods may be called from several threads.

    Args:
        source: The samples.
        log: The reviewer's decisions.
        order: Numbers of the samples that this reviewer is asked about, in their order.
    """

    def __init__(self, source: Source, log: ReviewerLog, order: Sequence[int]) -> None:
        self._source, self._log, self._order = source, log, order
        self._lock = threading.Lock()
        self._decided = log.latest()
        self._places = {source.items[number].id: at for at, number in enumerate(order)}

    @property
    def changed(self) -> int:
        """Samples with a decision about another content, which is not applied."""
        ids = {one_id for one_id, _ in self._decided}
        return sum(
            item.id in ids and self._key(item) not in self._decided for item in self._items()
        )

    @property
    def done(self) -> int:
        """Samples that were decided about."""
        return sum(self._key(item) in self._decided for item in self._items())

    def page(self, token: str) -> str:
        """Return the page, without a sample."""
        return render_page(
            TEMPLATES,
            "review.html",
            title="Review",
            lead=self._source.name,
            command="data review",
            styles=["sample.css", "review.css"],
            script="review.js",
            connects=True,
            token=token,
            reviewer=self._log.reviewer,
            total=len(self._order),
            types=sorted({item.type for item in self._items()} - {""}),
            show={name: words for name, words in SHOW.items() if self._has(name)},
            reasons=REASONS,
        )

    def sample(self, at: int, move: int, show: str, kind: str) -> dict[str, Any]:
        """Return a sample as the page shows it.

        Args:
            at: Place in the reviewer's order.
            move: 0: this sample, or the next one that the filter shows; 1: the next after it; -1:
                the one before it.
            show: A key of `SHOW`.
            kind: A type; "" for all.
        """
        with self._lock:
            shown = [place for place in range(len(self._order)) if self._shows(place, show, kind)]
            state = {"done": self.done, "total": len(self._order), "matching": len(shown)}
            if move < 0:
                found = next((place for place in reversed(shown) if place < at), None)
            else:
                found = next((place for place in shown if place >= at + (move > 0)), None)
            if found is None:
                return {**state, "at": None}
            return {**state, **self._view(found)}

    def decide(self, choice: Choice) -> dict[str, Any]:
        """Write a decision and return the sample as it is then.

        Raises:
            UserError: The sample has changed, or the decision is not complete.
        """
        with self._lock:
            if choice.at >= len(self._order):
                raise UserError("there is no such sample; load the page again")
            item = self._source.items[self._order[choice.at]]
            if (item.id, item.digest) != (choice.id, choice.digest):
                raise UserError("the review was started again meanwhile; load the page again")
            if (choice.decision == "reject") != (choice.reason in REASONS):
                raise UserError("a rejection needs a reason, and only a rejection has one")
            if (choice.decision == "edit") != (choice.turns is not None):
                raise UserError("an edit needs the text, and only an edit has one")
            if choice.turns is not None:  # refused before it is written
                self._source.sample(self._order[choice.at], choice.turns)
            made = self._log.append(
                item.id, item.digest, choice.decision, reason=choice.reason, turns=choice.turns
            )
            self._decided[self._key(item)] = made
            return {"done": self.done, "total": len(self._order), **self._view(choice.at)}

    def undo(self) -> dict[str, Any]:
        """Take back the last decision and return its sample; `at` is None if there is none."""
        with self._lock:
            last = self._log.undo()
            self._decided = self._log.latest()
            state = {"done": self.done, "total": len(self._order)}
            at = None if last is None else self._places.get(last.id)
            if at is None:
                return {**state, "at": None, "undone": last is not None}
            return {**state, **self._view(at)}

    def _items(self) -> list[Item]:
        return [self._source.items[number] for number in self._order]

    def _key(self, item: Item) -> tuple[str, str]:
        return item.id, item.digest

    def _has(self, name: str) -> bool:
        """Return whether a filter can show anything in these samples."""
        if name in ("rejected", "accepted"):
            return any(item.rejected for item in self._items())
        if name == "kept":
            return any(item.kept is not None for item in self._items())
        return name != "unknown" or any(item.unknown for item in self._items())

    def _shows(self, place: int, show: str, kind: str) -> bool:
        item = self._source.items[self._order[place]]
        decided = self._key(item) in self._decided
        matches = {
            "unreviewed": not decided, "reviewed": decided, "rejected": item.rejected,
            "accepted": not item.rejected, "unknown": item.unknown, "kept": bool(item.kept),
        }.get(show, True)  # fmt: skip
        return matches and kind in ("", item.type)

    def _view(self, at: int) -> dict[str, Any]:
        number = self._order[at]
        item = self._source.items[number]
        decision = self._decided.get(self._key(item))
        sample = self._source.sample(number, decision.turns if decision else None)
        badges = [(item.type, "")] if item.type else []
        if sample.checks:
            words = "rejected by the verifier" if sample.reasons else "accepted by the verifier"
            badges.append((words, "contradicted" if sample.reasons else "supported"))
        if item.kept is False and not item.rejected:
            badges.append(("dropped by clean", "contradicted"))
        html = render_fragment(
            TEMPLATES,
            "review_sample.html",
            images=self._source.images(number, sample),
            view=view_sample(
                sample, self._source.annotations(number), Path(), badges=badges, brief=False,
                with_image=False,
            ),
            note=self._source.note(number),
            decision=decision,
            words=decision.words if decision else "",
        )  # fmt: skip
        return {
            "at": at,
            "id": item.id,
            "digest": item.digest,
            "decision": _shown(decision),
            "turns": [{"question": t.question, "answer": t.answer} for t in sample.turns],
            "html": html,
        }


class ReviewServer(ThreadingHTTPServer):
    """Serves a review on this machine's own address.

    Attributes:
        review: What is served.
        token: The secret in the address of the page, so that other users of the machine can
            neither read nor decide.
    """

    daemon_threads = True

    def __init__(self, review: Review, port: int) -> None:
        self.review, self.token = review, secrets.token_urlsafe(24)
        super().__init__((HOST, port), _Handler)


def make_server(review: Review, port: int) -> tuple[ReviewServer, str]:
    """Return a server on this machine's own address, and the address of its page.

    Args:
        review: What it serves.
        port: 0 for a free one.

    Raises:
        UserError: The port is in use.
    """
    try:
        server = ReviewServer(review, port)
    except OSError as error:
        raise UserError(
            f"--port {port}: cannot listen on {HOST}: {error.strerror}; leave it out for a free one"
        ) from None
    return server, f"http://{HOST}:{server.server_port}/{server.token}/"


class Refused(Exception):
    """A request that is not answered; `status` says why."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    timeout = TIMEOUT_SECONDS
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vlm_sft", ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        pass  # addresses hold the secret

    def _answer(self, work: Any) -> None:
        self.close_connection = self.command == "POST"
        try:
            kind, body = work(self._path())
            self._send(HTTPStatus.OK, kind, body)
        except Refused as error:
            self.close_connection = True
            self._send(error.status, "application/json", _json({"error": str(error)}))
        except (UserError, ValidationError) as error:
            is_form = isinstance(error, ValidationError)
            found = "the request is not of this page" if is_form else str(error)
            self._send(HTTPStatus.BAD_REQUEST, "application/json", _json({"error": found}))
        except OSError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            found = f"the decision may not be on the disk: {error.strerror}"
            self._send(
                HTTPStatus.INTERNAL_SERVER_ERROR, "application/json", _json({"error": found})
            )

    def _path(self) -> str:
        """Return the path below the secret of a request that this page has sent."""
        port = self.connection.getsockname()[1]
        hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        if self.headers.get("Host") not in hosts:  # DNS rebinding
            raise Refused(HTTPStatus.FORBIDDEN, "this address is not that of the page")
        own = {f"http://{host}" for host in hosts}
        origin = self.headers.get("Origin")
        if origin not in own | {None} or (self.command == "POST" and origin is None):
            raise Refused(HTTPStatus.FORBIDDEN, "the request comes from another page")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Refused(HTTPStatus.FORBIDDEN, "the request comes from another page")
        parts = urlsplit(self.path).path.split("/")
        if len(parts) != 3 or not hmac.compare_digest(
            parts[1].encode(), self.server.token.encode()
        ):
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        return parts[2]

    def _get(self, path: str) -> tuple[str, bytes]:
        if path == "":
            return "text/html; charset=utf-8", self.server.review.page(self.server.token).encode()
        if path != "sample":
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        given = {name: of[0] for name, of in parse_qs(urlsplit(self.path).query).items()}
        try:
            at, move = int(given.get("at", "0")), int(given.get("move", "0"))
        except ValueError:
            raise Refused(HTTPStatus.BAD_REQUEST, "at, move: expected numbers") from None
        found = self.server.review.sample(at, move, given.get("show", "all"), given.get("type", ""))
        return "application/json", _json(found)

    def _post(self, path: str) -> tuple[str, bytes]:
        kind = self.headers.get("Content-Type", "").partition(";")[0]
        sent = self.headers.get("X-Review-Token", "")
        if kind != "application/json" or not hmac.compare_digest(
            sent.encode("utf-8", "replace"), self.server.token.encode()
        ):
            raise Refused(HTTPStatus.FORBIDDEN, "the request is not of this page")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the text is too long")
        body = self.rfile.read(int(length))
        if path == "decide":
            return "application/json", _json(
                self.server.review.decide(Choice.model_validate_json(body))
            )
        if path == "undo":
            return "application/json", _json(self.server.review.undo())
        raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _shown(decision: Decision | None) -> dict[str, Any] | None:
    return None if decision is None else {"kind": decision.decision, "words": decision.words}
