"""The prompts: what every request of a type begins with, and the messages of one request."""

from collections.abc import Mapping
from typing import Any

from data_tools.instruct.schema import Request


def messages(request: Request, templates: Mapping[str, Any]) -> list[dict[str, str]]:
    """What is sent: system text, seed examples as earlier turns, then the picture's own context.

    All but the last message are the same for every request of a template, so that servers can
    keep their computed prefix.
    """
    fixed: list[dict[str, str]] = templates[request.template]["messages"]
    return [*fixed, {"role": "user", "content": request.context}]
