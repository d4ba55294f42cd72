"""Packages that only the building of instruction data needs."""

from importlib import import_module
from typing import Any

from vlm_sft.errors import UserError


def require(name: str) -> Any:
    """The package, imported.

    Raises:
        UserError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"the package {name!r} cannot be imported ({error}); "
            "install it with `pip install -e '.[instruct]'`"
        ) from None
