"""Turn exceptions of third-party libraries into one sentence about a configuration key."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Final

from vlm_sft.errors import UserError

_LONGEST: Final = 300
_EXTRAS: Final = {
    "matplotlib": "plots",
    "tensorboard": "tensorboard",
    "wandb": "track",
    "trackio": "track",
    "mlflow": "track",
    "datasets": "datasets",
    "pandas": "instruct",
    "datasketch": "instruct",
    "imagehash": "instruct",
    "fastapi": "serve",
    "uvicorn": "serve",
    "gguf": "gguf",
    "bitsandbytes": "qlora",
    "torchao": "fp8",
}
"""The extra that installs a package, by the name that is imported."""

_TERSE: Final = (KeyError, IndexError, AttributeError, AssertionError, ArithmeticError, TypeError)
"""Exceptions whose message means little without the name of their type."""


@contextmanager
def library_call(library: str, key: str, action: str, *, code: str | None = None) -> Iterator[None]:
    """Turn any exception of the block into a user error, with the exception as its cause.

    For blocks that build or load something from the user's values. Libraries raise exceptions of
    any type for a wrong value, so no types are listed here.

    Args:
        library: Name of the library, e.g. `transformers`.
        key: The configuration key (or file) that the values came from.
        action: What the block does, as a verb phrase: `build the model`.
        code: The name of the error in `vlm_sft.errors.codes`; None for the general one.

    Raises:
        UserError: Instead of any other exception; a `UserError` passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = one_line(error)
        offline = any(map(os.environ.get, ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")))
        if "HF_HUB_OFFLINE=0" in str(error) and not offline:
            # Set by `use_cache_if_hub_unreachable`; the advice to unset it would lead nowhere.
            reason = "the hub cannot be reached, and the local cache does not have it"
        raise UserError(f"{key}: {library} cannot {action}: {reason}", code=code) from error


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line, shortened."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, _TERSE):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def installed_version(name: str) -> str:
    """Return a package's version, or "not installed" (vlm-sft can run from a checkout)."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this project, in any environment that has it."""
    return f"pip install 'vlm-sft[{extra}]'"


def require_extra(name: str, needed_for: str) -> None:
    """Check that a package of an extra is installed, without importing it.

    Args:
        name: The package, as it is imported.
        needed_for: The option or setting that needs it, with which the message begins.

    Raises:
        UserError: It is not installed; the message has the command that installs it.
    """
    if not is_installed(name):
        raise UserError(
            f"{needed_for}: the package {name!r} is not installed; install it with "
            f"`{install_command(_EXTRAS[name])}`"
        )


def require_trackers(names: Sequence[str]) -> None:
    """Check that the packages of `train.trackers` are installed, without importing them.

    Raises:
        UserError: One is not; the message has the command that installs it.
    """
    for name in names:
        if not is_installed(name):
            raise UserError(
                f"train.trackers: {name} is not installed; run `{install_command(_EXTRAS[name])}`, "
                "or take it off the list"
            )


def is_installed(name: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return find_spec(name) is not None


def missing_extra(error: ModuleNotFoundError) -> UserError | None:
    """Return the error of a command that needs a package of an extra; None for another package."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return None
    return UserError(
        f"this needs the package {package!r}, which is not installed; install it with "
        f"`{install_command(_EXTRAS[package])}`"
    )


def import_extra(name: str, extra: str) -> Any:
    """Import a package that only an extra of this project installs.

    Raises:
        UserError: It cannot be imported; the message has the command that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"the package {name!r} cannot be imported ({error}); install it with "
            f"`{install_command(extra)}`"
        ) from None
