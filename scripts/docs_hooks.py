"""Adapt pages that are also read in the repository to the site: links to files outside of docs/."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(configs|scripts|vlm_sft|data_tools|tests)/[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leave only the text of links to configurations and source files, which the site lacks."""
    return _OUTSIDE.sub(r"`\1`", markdown)
