"""Second reading: the chosen records under unique ids, as messages."""

import base64
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from data_tools.instruct.clean.texts import digest
from data_tools.mix.config import MixConfig
from data_tools.mix.scan import Source, conversations, data_file
from vlm_sft.data.conversation import Conversation, ImageSource, TextPart, Turn
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.progress import track

_KINDS: Final = {
    b"\xff\xd8": "jpeg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"RIFF": "webp",
    b"BM": "bmp",
}


def records(
    sources: Sequence[Source], times: Sequence[NDArray[np.uint32]], image_root: Path
) -> Iterator[dict[str, Any]]:
    """The mixture in the order of the sources and their files; the trainer shuffles.

    Raises:
        UserError: An image lies outside of `image_root`, two records get one id, or a source has
            changed since it was first read.
    """
    given: set[int] = set()
    for source, wanted in zip(sources, times, strict=True):
        name = source.config.name
        repeated = _repeated(source.ids)
        seen: Counter[int] = Counter()
        found = track(conversations(source.config), len(wanted), f"writing {name}")
        for place, record in enumerate(found):
            if place >= len(wanted) or (isinstance(record, RecordError) and wanted[place]):
                raise UserError(f"{source.config.path}: has changed while it was read; mix again")
            if isinstance(record, RecordError):
                continue
            own = digest(record.id)
            number = 1
            if own in repeated:
                seen[own] += 1
                number = seen[own]
            for copy in range(1, int(wanted[place]) + 1):
                record_id = _id(name, record.id, number, copy)
                _require_new(record_id, given)
                yield as_messages(record, record_id, image_root)


def common_root(config: MixConfig, sources: Sequence[Source]) -> Path:
    """The folder that all images lie below."""
    if config.image_root is not None:
        return Path(os.path.abspath(config.image_root))
    roots = []
    for source in sources:
        if not source.config.replay:
            file = data_file(source.config)
            path = Path(file.path)
            root = file.image_root or (path if path.is_dir() else path.parent)
            roots.append(os.path.abspath(root))
    return Path(os.path.commonpath(roots or [os.path.abspath(config.output_dir)]))


def as_messages(record: Conversation, record_id: str, image_root: Path) -> dict[str, Any]:
    """The record as messages whose content is parts; reading it gives the same conversation."""
    return {
        "id": record_id,
        "messages": [_message(turn, record, image_root) for turn in record.turns],
    }


def _message(turn: Turn, record: Conversation, image_root: Path) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image", "image": _image(record.images[part.index], record, image_root)}
        for part in turn.parts
    ]
    message: dict[str, Any] = {"role": turn.role, "content": parts}
    if turn.image_separator is not None and any(p["type"] == "image" for p in parts):
        message["image_separator"] = turn.image_separator
    if not turn.supervised:
        message["loss"] = False
    return message


def _image(image: ImageSource, record: Conversation, image_root: Path) -> str:
    if isinstance(image, bytes):
        kind = next((k for head, k in _KINDS.items() if image.startswith(head)), "tiff")
        return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    try:
        return image.relative_to(image_root).as_posix()
    except ValueError:
        raise UserError(
            f"{record.where}: record {record.id!r}: the image {image} is not below {image_root}; "
            "set `image_root` to a folder that holds the images of all sources",
            code="image_path",
        ) from None


def _repeated(ids: NDArray[np.uint64]) -> set[int]:
    """Ids that a source gives more than once."""
    values, counts = np.unique(ids[ids != 0], return_counts=True)
    return {int(value) for value in values[counts > 1]}


def _id(source: str, record_id: str, number: int, copy: int) -> str:
    again = f"#{number}" if number > 1 else ""
    return f"{source}/{record_id}{again}" + (f"+{copy}" if copy > 1 else "")


def _require_new(record_id: str, given: set[int]) -> None:
    key = digest(record_id)
    if key in given:
        raise UserError(
            f"two records would be called {record_id!r}: an id of the source ends in a mark that "
            "is given to repeated ones (#2, +2); change that id"
        )
    given.add(key)
