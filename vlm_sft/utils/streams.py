"""Make the standard streams accept any text."""

import io
import os
import sys


def accept_any_text() -> None:
    r"""Configure the standard streams so that no character can raise an encoding error.

    A character that the encoding of stdout or stderr lacks is written as `\u20ac`. Bytes of stdin
    outside its encoding become lone surrogates, which `errors.as_text` handles. A stream that the
    caller closed is replaced by the null device.
    """
    for name, errors in (
        ("stdin", "surrogateescape"),
        ("stdout", "backslashreplace"),
        ("stderr", "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            null = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115  # open until exit
            setattr(sys, name, null)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def holds_unicode() -> bool:
    """Return whether stdout can encode every character, so that JSON needs no escapes."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
