"""Load a checkpoint and serve it over HTTP."""

import argparse
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from vlm_sft.checkpoint.base_models import parse_bases
from vlm_sft.errors import UserError
from vlm_sft.inference.loaded_model import load_checkpoint
from vlm_sft.serving.app import make_app
from vlm_sft.serving.engine import Engine, can_join
from vlm_sft.serving.protocol import Limits

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 60
"""After SIGTERM or Ctrl-C, requests in flight have this long to finish."""


class Server(uvicorn.Server):
    """A server that returns after SIGTERM or Ctrl-C; uvicorn's raises the signal once more."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ask the server to exit on a signal within the block."""
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, then finish the requests in flight; return the exit code."""
    loaded = load_checkpoint(
        arguments.checkpoint,
        device=arguments.device,
        bases=parse_bases(arguments.base),
        template=arguments.template,
    )
    if not can_join(loaded):
        logger.warning(
            "this language model has layers with a sliding window or a state: requests are "
            "answered one after another"
        )
    name = arguments.served_name or Path(arguments.checkpoint).resolve().name
    limits = Limits(
        max_body=arguments.max_body_mb * 2**20,
        max_images=arguments.max_images,
        max_pixels=arguments.max_pixels,
        max_tokens=arguments.max_tokens,
        image_dir=arguments.image_dir,
    )
    engine = Engine(loaded, max_batch=arguments.max_batch, max_queue=arguments.max_queue)
    app = make_app(loaded, engine, name, limits, api_key(arguments.api_key_env))
    config = uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = Server(config)
    logger.info(
        "serving %s as %r at http://%s:%d/v1 (Ctrl-C stops)",
        arguments.checkpoint,
        name,
        arguments.host,
        arguments.port,
    )
    try:
        server.run()
    except SystemExit:
        raise UserError(
            f"--port {arguments.port}: cannot listen on {arguments.host}; is the port in use?"
        ) from None
    finally:
        engine.close()
    return 0


def api_key(variable: str | None) -> str | None:
    """Return the key in an environment variable, or None if no variable is named.

    Raises:
        UserError: The variable is not set.
    """
    if variable is None:
        return None
    if not (value := os.environ.get(variable)):
        raise UserError(f"--api-key-env {variable}: the environment variable is not set")
    return value
