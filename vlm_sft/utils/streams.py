"""Standard streams in any encoding, or closed."""

import io
import os
import sys


def accept_any_text() -> None:
    r"""Set the standard streams up so that no character of any text can stop a command.

    What the encoding of stdout or stderr has no bytes for is written as `\u20ac`. Bytes of stdin
    that are not in its encoding arrive as half surrogate pairs, for `errors.as_text`. A stream
    that the caller closed becomes the null device.
    """
    for name, errors in (
        ("stdin", "surrogateescape"),
        ("stdout", "backslashreplace"),
        ("stderr", "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            null = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115  # until the exit
            setattr(sys, name, null)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def holds_unicode() -> bool:
    """Return whether stdout has bytes for every character, so that JSON needs no escapes."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
