"""Seed tasks of `self-instruct`: questions as people ask them, about no image in particular."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Final

from pydantic import Field, ValidationError

from data_tools.instruct.schema import Line
from vlm_sft.errors import UserError
from vlm_sft.utils.image_paths import looked_for
from vlm_sft.utils.reading import read_text

LEAST: Final = 8
"""Seed tasks of a file, at least: with fewer every request would show the same."""


class SeedTask(Line):
    """A question with an id; a receipt has `seed:ID`."""

    id: str = Field(min_length=1)
    question: str = Field(min_length=1)


class _SeedTasks(Line):
    tasks: tuple[SeedTask, ...] = Field(min_length=LEAST)


def read_seed_tasks(path: Path | None) -> tuple[SeedTask, ...]:
    """Return the seed tasks of a file, a JSON list of objects with `id` and `question`.

    Args:
        path: The file; None: ours.

    Raises:
        UserError: There is no such file, it has another form, or an id or question appears twice.
    """
    if path is None:
        ours = files("data_tools.instruct").joinpath("prompts", "grow", "seed_tasks.json")
        text = ours.read_text(encoding="utf-8")
    else:
        try:
            text = read_text(path)
        except FileNotFoundError:
            raise UserError(
                f"--seed-tasks {path}: no such file{looked_for(path)}", code="data_file_missing"
            ) from None
    form = 'a JSON list of objects such as {"id": "1", "question": "What is this used for?"}'
    try:
        found = _SeedTasks.model_validate({"tasks": json.loads(text)}).tasks
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"--seed-tasks {path}: {place}: {first['msg']}; expected {form}", code="json_syntax"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"--seed-tasks {path}: expected {form}", code="json_syntax") from None
    for name in ("id", "question"):
        values = [getattr(task, name) for task in found]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise UserError(f"--seed-tasks {path}: the {name} {twice!r} appears twice")
    return found
