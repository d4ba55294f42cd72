"""Read pairs of a better and a worse answer, and write them as TRL reads them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from vlm_sft.data.conversation import Conversation, ImagePart
from vlm_sft.data.record_formats import RawRecord, parse_record
from vlm_sft.data.records import open_raw_records
from vlm_sft.errors import RecordError

_ANSWERS: Final = {
    "conversations": lambda text: {"from": "gpt", "value": text},
    "messages": lambda text: {"role": "assistant", "content": text},
}
"""How an answer is written in each format of records, by the key of its turns."""


@dataclass(frozen=True)
class PreferencePair:
    """A conversation that ends with a question, and two answers to it.

    Attributes:
        prompt: The conversation without the answers.
        chosen: The better answer.
        rejected: The worse answer.
    """

    prompt: Conversation
    chosen: str
    rejected: str


def read_pairs(
    path: Path, image_root: Path | None = None
) -> Iterator[PreferencePair | RecordError]:
    """Yield the pairs of a file of records, and an error for each record that is none.

    A record is one of training data in LLaVA's or `messages` format whose last turn is the user's,
    with the two answers as text in `chosen` and `rejected`.

    Args:
        path: JSON, JSONL or Parquet.
        image_root: Folder of the images; None: the folder of the file.

    Raises:
        UserError: The file as a whole cannot be read.
    """
    root = path.parent if image_root is None else image_root
    for raw in open_raw_records(path).records:
        if isinstance(raw, RecordError):
            yield raw
            continue
        try:
            yield _pair(raw, root)
        except RecordError as error:
            yield error


def trl_row(pair: PreferencePair) -> dict[str, Any]:
    """Return a pair as a row of TRL's preference format for vision models, with images as paths.

    Raises:
        ValueError: An image is not a file.
    """
    if not all(isinstance(image, Path) for image in pair.prompt.images):
        raise ValueError(f"{pair.prompt.where}: images in records must be files for TRL")
    return {
        "id": pair.prompt.id,
        "images": [str(image) for image in pair.prompt.images],
        "prompt": [
            {"role": turn.role, "content": [_part(part) for part in turn.parts]}
            for turn in pair.prompt.turns
        ],
        "chosen": _answer(pair.chosen),
        "rejected": _answer(pair.rejected),
    }


def _pair(raw: RawRecord, image_root: Path) -> PreferencePair:
    """Return the pair of a record.

    Raises:
        RecordError: With reason `format` if it has no two different answers, or as `parse_record`.
    """
    record: Any = raw.value
    keys = [key for key in _ANSWERS if isinstance(record, Mapping) and record.get(key)]
    if len(keys) != 1 or not isinstance(record[keys[0]], list):
        raise _error(raw, "expected a list of turns in `conversations` or `messages`")
    answers = [record.get("chosen"), record.get("rejected")]
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise _error(raw, "expected two answers as text, `chosen` and `rejected`")
    if answers[0] == answers[1]:
        raise _error(raw, "`chosen` and `rejected` are the same answer")
    turns, answer = record[keys[0]], _ANSWERS[keys[0]]
    # Parsed with an answer, as records are, so that the same rules hold for turns and images.
    parsed = [
        parse_record(
            replace(raw, value={**record, keys[0]: [*turns, answer(text)]}), None, image_root
        )
        for text in answers
    ]
    prompt = replace(parsed[0], turns=parsed[0].turns[:-1])
    return PreferencePair(prompt, *(_text(conversation) for conversation in parsed))


def _text(conversation: Conversation) -> str:
    return "".join(getattr(part, "text", "") for part in conversation.turns[-1].parts)


def _error(raw: RawRecord, message: str) -> RecordError:
    return RecordError("format", message, record_id=raw.fallback_id, where=raw.where)


def _part(part: Any) -> dict[str, Any]:
    return {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}


def _answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
