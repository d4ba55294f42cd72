"""Turn any exception of a third-party library into one sentence about a configuration key."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from vlm_sft.errors import UserError

_LONGEST: Final = 300
_TERSE: Final = (KeyError, IndexError, AttributeError, AssertionError, ArithmeticError, TypeError)
"""Exceptions whose message means little without the name of their type."""


@contextmanager
def library_call(library: str, key: str, action: str, *, code: str | None = None) -> Iterator[None]:
    """Report whatever a library raises in the block as a user error; the cause is kept.

    For blocks that construct or load something from values that the user gave. A library may
    answer a wrong value with any type of exception, so none is listed here.

    Args:
        library: Name of the library, e.g. `transformers`.
        key: The configuration key (or file) that the values came from.
        action: What the block does, as an infinitive: `build the model`.
        code: The fault's name in `error_codes`; None for the general one.

    Raises:
        UserError: In place of any other exception; a `UserError` passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{key}: {library} cannot {action}: {one_line(error)}", code=code
        ) from error


def one_line(error: BaseException) -> str:
    """Return the beginning of a library's message on one line."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, _TERSE):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def installed_version(name: str) -> str:
    """Return a package's version, or "not installed": vlm-sft may be run from its sources."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
