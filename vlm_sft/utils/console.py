"""Print to the terminal: the one way, through which every text becomes visible and harmless."""

import json
import sys
from collections.abc import Iterable
from typing import IO, Any, Final

import rich.console
from rich.segment import Segment

from vlm_sft.utils.escape import INVISIBLE_CODES, visible
from vlm_sft.utils.streams import holds_unicode

_JSON_ESCAPES: Final = {
    code: json.dumps(chr(code))[1:-1] if code != 0x7F else "\\u007f"
    for code in INVISIBLE_CODES
    if code >= 0x7F
}
"""Every code here is escaped by JSON's own rules, so a reader gets the text as it was; `json` has
escaped those below 0x7F itself."""


def say(text: object = "", *, end: str = "\n", file: IO[str] | None = None) -> None:
    """Print `visible` text to stderr, or to `file`, at once; tabs and line ends stay."""
    shown = "\t".join(map(visible, str(text).split("\t")))
    print(shown, end=end, file=sys.stderr if file is None else file, flush=True)


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Print a value as JSON on stdout, with escapes for what would command a terminal."""
    text = json.dumps(value, ensure_ascii=not holds_unicode(), indent=indent)
    print(text.translate(_JSON_ESCAPES), flush=True)


class Console(rich.console.Console):
    """A console of rich whose texts are `visible`; only rich itself sends control codes."""

    def render(
        self, renderable: Any, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of `renderable`, with foreign text made visible."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)
