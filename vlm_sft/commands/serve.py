"""Load a checkpoint, or two, and serve them over HTTP."""

import argparse
import logging
import os
from pathlib import Path

from vlm_sft.checkpoint.base_models import parse_bases
from vlm_sft.errors import UserError
from vlm_sft.inference.loaded_model import load_checkpoint
from vlm_sft.serving.app import ServedModel, make_app
from vlm_sft.serving.engine import Engine
from vlm_sft.serving.images import ImageLimits
from vlm_sft.serving.listener import make_server
from vlm_sft.serving.protocol import Limits
from vlm_sft.utils.addresses import is_loopback

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, then finish the requests in flight; return the exit code."""
    key = api_key(arguments.api_key_env)
    paths = [arguments.checkpoint]
    if arguments.compare is not None:
        paths.append(arguments.compare)
    names = served_names(paths)
    names[0] = arguments.served_name or names[0]
    if len(set(names)) < len(names):
        raise UserError(f"--served-name {names[0]}: this is also the name of {paths[1]}")
    models = [_load(path, name, arguments) for path, name in zip(paths, names, strict=True)]
    app = make_app(
        models,
        read_limits(arguments),
        key,
        local_only=key is None and is_loopback(arguments.host),
        with_page=arguments.ui,
    )
    shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"http://{shown}:{arguments.port}"

    def announce() -> None:
        for path, name in zip(paths, names, strict=True):
            logger.info("serving %s as %r at %s/v1 (Ctrl-C stops)", path, name, address)
        if arguments.ui:
            logger.info("chat page: %s/", address)

    if key is None and not is_loopback(arguments.host):
        logger.warning(
            "--host %s: everybody who reaches this address can use the model; --api-key-env sets "
            "a key",
            arguments.host,
        )
    server = make_server(app, arguments.host, arguments.port, announce)
    try:
        server.run()
    except SystemExit:
        raise UserError(
            f"--port {arguments.port}: cannot listen on {arguments.host}; is the port in use?"
        ) from None
    finally:
        for model in models:
            model.engine.close()
    return 0


def _load(path: Path, name: str, arguments: argparse.Namespace) -> ServedModel:
    loaded = load_checkpoint(
        path,
        device=arguments.device,
        bases=parse_bases(arguments.base),
        template=arguments.template,
    )
    engine = Engine(loaded, max_batch=arguments.max_batch, max_queue=arguments.max_queue)
    if not engine.joins:
        logger.warning(
            "%s: this language model has layers with a sliding window or a state: requests are "
            "answered one after another",
            path,
        )
    return ServedModel(name, loaded, engine)


def read_limits(arguments: argparse.Namespace) -> Limits:
    """Return the limits that the command line asks for."""
    return Limits(
        max_body=arguments.max_body_mb * 2**20,
        max_tokens=arguments.max_tokens,
        max_memory=arguments.max_memory_mb * 2**20,
        images=ImageLimits(
            max_images=arguments.max_images,
            max_pixels=arguments.max_pixels,
            max_bytes=arguments.max_body_mb * 2**20,
            image_dir=arguments.image_dir,
            remote_hosts=arguments.allow_remote_images,
        ),
    )


def served_names(paths: list[Path]) -> list[str]:
    """Return the names of models in the API: their folders, with parents if needed to differ.

    Raises:
        UserError: A folder is given twice.
    """
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise UserError(f"--compare {paths[1]}: this is the same checkpoint; give another one")
    for count in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-count:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different names")


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
