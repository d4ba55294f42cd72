"""Print to the terminal; every text is escaped first, so data cannot send control codes."""

import json
import sys
from collections.abc import Iterable
from typing import IO, Any, Final

import rich.console
from rich.segment import Segment

from vlm_sft.utils.escape import INVISIBLE_CODES, escape_control
from vlm_sft.utils.streams import holds_unicode

_JSON_ESCAPES: Final = {
    code: json.dumps(chr(code))[1:-1] if code != 0x7F else "\\u007f"
    for code in INVISIBLE_CODES
    if code >= 0x7F
}
"""JSON escapes of the code points that a terminal would interpret; parsers restore the text.

`json.dumps` already escapes those below 0x7F."""


def echo(text: object = "", *, end: str = "\n", file: IO[str] | None = None) -> None:
    """Print escaped text to stderr, or to `file`, and flush; tabs and newlines are kept."""
    shown = "\t".join(map(escape_control, str(text).split("\t")))
    print(shown, end=end, file=sys.stderr if file is None else file, flush=True)


def echo_json(value: Any, *, indent: int | None = None) -> None:
    """Print a value as JSON on stdout, with control characters escaped."""
    text = json.dumps(value, ensure_ascii=not holds_unicode(), indent=indent)
    print(text.translate(_JSON_ESCAPES), flush=True)


class Console(rich.console.Console):
    """A rich console that escapes every text; only rich itself sends control codes."""

    def render(
        self, renderable: Any, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of `renderable`, with untrusted text escaped."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(escape_control(segment.text), segment.style)
