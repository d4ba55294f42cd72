"""The HTTP listener: uvicorn, with an orderly end and a limit on slow clients."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

DRAIN_SECONDS: Final = 60
"""After SIGTERM or Ctrl-C, requests in flight have this long to finish."""
IDLE_SECONDS: Final = 30.0
"""A connection without a request in flight is closed after this time."""


class Server(uvicorn.Server):
    """A server that returns after SIGTERM or Ctrl-C; uvicorn's raises the signal once more.

    Args:
        config: For uvicorn.
        on_start: Called once the server listens.
    """

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self._on_start()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ask the server to exit on a signal within the block."""
        if threading.current_thread() is not threading.main_thread():  # has no signals
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Connection(H11Protocol):
    """A connection that ends if its client does not send a whole request head in time.

    uvicorn limits the time between two requests only, so that connections which send nothing, or
    half a head, would be kept for ever.
    """

    idle_since: float | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to watch the connection."""
        super().connection_made(transport)
        self._watch()

    def _watch(self) -> None:
        """Close the connection if it has waited too long for a request; otherwise look again."""
        if self.transport.is_closing():
            return
        now = self.loop.time()
        if self.cycle is not None and not self.cycle.response_complete:
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = now
        elif now - self.idle_since >= IDLE_SECONDS:
            self.transport.close()
            return
        self.loop.call_later(IDLE_SECONDS / 10, self._watch)


def make_server(
    app: FastAPI, host: str, port: int, on_start: Callable[[], None] = lambda: None
) -> Server:
    """Return the server of an application; it calls `on_start` once it listens."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Connection,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    return Server(config, on_start)
