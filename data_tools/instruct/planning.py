"""Pictures become requests: chosen, guarded, written down and priced before anything is sent."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from data_tools.instruct.folder import RunFolder
from data_tools.instruct.lines import read_lines
from data_tools.instruct.schema import Request
from vlm_sft.errors import UserError


def read_requests(folder: RunFolder) -> Iterator[Request]:
    """The run's requests, one at a time, in the order that every later file keeps.

    Raises:
        UserError: Nothing has been planned yet.
    """
    return read_lines(folder.requests, Request)


def read_templates(folder: RunFolder) -> Mapping[str, Any]:
    """The prompts by name: `messages` (the fixed beginning), `answer_schema`, `sha256`.

    Raises:
        UserError: Nothing has been planned yet.
    """
    try:
        templates: Mapping[str, Any] = json.loads(folder.templates.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder.templates}: there is no such file; run `plan` first",
            code="data_file_missing",
        ) from None
    return templates
