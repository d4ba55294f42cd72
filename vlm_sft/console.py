"""Print to the terminal: the one way, through which every text becomes visible and harmless."""

import sys
from collections.abc import Iterable
from typing import IO, Any

import rich.console
from rich.segment import Segment

from vlm_sft.visible import visible


def say(text: object = "", *, end: str = "\n", file: IO[str] | None = None) -> None:
    """Print `visible` text to stderr, or to `file`, at once."""
    print(visible(str(text)), end=end, file=sys.stderr if file is None else file, flush=True)


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
