"""The words of captions, questions and answers, from JSON files in this folder."""

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def load(name: str) -> Any:
    """The content of `wording/<name>.json`; read once in a process, not to be changed."""
    return json.loads(files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
