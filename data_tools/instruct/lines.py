"""Files with one JSON object per line, read and written as a stream."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from vlm_sft.errors import UserError
from vlm_sft.utils.owned_files import owned_open
from vlm_sft.utils.reading import open_regular

ModelT = TypeVar("ModelT", bound=BaseModel)


def read_lines(path: Path, model: type[ModelT]) -> Iterator[ModelT]:
    """Yield the file's objects.

    Raises:
        UserError: There is no such file, or a line has another form; the message has its number.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file; run the stage that writes it first",
            code="data_file_missing",
        ) from None
    with file:
        for number, line in enumerate(file, 1):
            try:
                yield model.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"]))
                raise UserError(
                    f"{path}:{number}: {place + ': ' if place else ''}{first['msg']}; the file was "
                    "not written by this version, or was changed; run its stage again",
                    code="json_syntax",
                ) from None


def write_lines(path: Path, values: Iterable[BaseModel]) -> int:
    """Replace the file when all objects are on the disk, in order; return their number."""
    count = 0
    with owned_open(path) as file:
        for value in values:
            file.write(value.model_dump_json().encode() + b"\n")
            count += 1
    return count
