"""The formats of records (LLaVA, messages, Alpaca): a parsed value to a conversation."""

import base64
import binascii
import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

from vlm_sft.data.conversation import (
    Conversation,
    ImagePart,
    ImageSource,
    Part,
    Role,
    TextPart,
    Turn,
)
from vlm_sft.errors import ImageError, RecordError
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER
from vlm_sft.utils.image_paths import image_path

Form = Literal["llava", "messages", "alpaca"]

ROLES: Final[dict[str, Role]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
"""Values of `from` and `role`."""

MAX_RECORD_BYTES: Final = 64 * 2**20
"""A larger record is quarantined, whatever the kind of file, and never held in memory."""

MAX_ID: Final = 4096
"""Longest id of a record in characters."""

MAX_TURNS: Final = 10_000
MAX_IMAGES: Final = 10_000
"""Most turns and images of a record. Each costs time and memory before a length limit applies."""

FORMAT_KEYS: Final[dict[str, Form]] = {
    "conversations": "llava",
    "messages": "messages",
    "instruction": "alpaca",
}
"""The key that identifies a record's format."""


_OTHER_PLACEHOLDERS: Final = re.compile(
    r"<\|(image|image_pad|image_\d+|vision_start|IMAGE)\|>|<(image_placeholder|image_\d+|ImageHere"
    r"|image_soft_token|start_of_image|Image|IMAGE|img|IMG|IMG_CONTEXT)>|\[IMG\]|<__media__>"
)
"""Image placeholders of other tools."""


@dataclass(frozen=True)
class RawRecord:
    """The parsed value of one record.

    Attributes:
        value: A value of any type; records are objects.
        where: `file:line` (lines from 1) or `file[index]`.
        fallback_id: `line-N` or `index-N`, for records without an id.
    """

    value: Any
    where: str
    fallback_id: str

    def error(self, reason: str, message: str) -> RecordError:
        """Return the error of this record, with its place."""
        return RecordError(reason, message, record_id=self.fallback_id, where=self.where)


@dataclass(frozen=True)
class Columns:
    """The column of each part of a record; None for parts that the table does not have.

    Attributes:
        id: Id of the record.
        image: File name or bytes of the image, or a list of them.
        question: The question.
        input: Text that follows the question on a line of its own (Alpaca).
        answer: The answer.
        text: A caption, instead of question and answer.
        messages: Turns in LLaVA's or the messages format, or their JSON text.
    """

    id: str | None = None
    image: str | None = None
    question: str | None = None
    input: str | None = None
    answer: str | None = None
    text: str | None = None
    messages: str | None = None

    def used(self) -> dict[str, str]:
        """Return the column of every part that the table has."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {part: column for part, column in values.items() if column is not None}


@dataclass(frozen=True)
class RawRecords:
    """The parsed values of one file, before they are conversations.

    Attributes:
        total: The number of records, or an upper bound of it; for progress bars.
        records: A value per record, an error per record without one. Can be iterated once.
        header: Names of the columns, if the file is a table that states them.
        columns: Where the parts of a row are, if the kind of file determines it.
        is_image_folder: Whether the file describes the images of a folder: every row has an image,
            and none repeats another.
        image_root: Folder that image names start from, if it is not that of the configuration.
    """

    total: int
    records: Iterator[RawRecord | RecordError]
    header: Sequence[str] | None = None
    columns: Columns | None = None
    is_image_folder: bool = False
    image_root: Path | None = None


def parse_record(
    raw: RawRecord, form: Form | None, image_root: Path, *, follow_symlinks: bool = False
) -> Conversation:
    """Convert the parsed value of a record into a conversation.

    Args:
        raw: The value, with its place for errors.
        form: The format; None detects it by the record's keys.
        image_root: Folder that image names are relative to and may not leave.
        follow_symlinks: Whether symbolic links below `image_root` may leave it.

    Raises:
        RecordError: With a reason for the ledger: `format`, `bad_id`, `bad_turn`, `unknown_role`,
            `role_order`, `no_answer`, `empty_answer`, `bad_loss`, `tool_calls`, `bad_text`,
            `image_count`, `image_path`, `image_field`, `image_in_answer`.
    """
    return _Reader(raw, image_root, follow_symlinks).read(form)


class _Reader:
    """Reads one record.

    Attributes:
        value: The parsed value.
        where: The record's place, for errors.
        id: The record's id, or the fallback id until it is known.
        listed: Values of the record's `image` or `images` field, in order.
        drafts: The turns so far; images are matched with `listed` at the end.
    """

    def __init__(self, raw: RawRecord, image_root: Path, follow_symlinks: bool) -> None:
        self.value, self.where, self.id = raw.value, raw.where, raw.fallback_id
        self.root, self.follow_symlinks = image_root, follow_symlinks
        self.listed: list[Any] = []
        self.drafts: list[_Draft] = []

    def error(self, reason: str, message: str) -> RecordError:
        return RecordError(reason, message, record_id=self.id, where=self.where)

    def read(self, form: Form | None) -> Conversation:
        record = self.value
        if not isinstance(record, Mapping):
            raise self.error("format", f"expected an object, found {_kind(record)}")
        self.id = self._id(record)
        form = form or self._form(record)
        self.listed = self._listed_images(record)
        if form == "alpaca":
            self._read_alpaca(record)
        else:
            self._read_turns(record, form)
        self._check_order()
        return self._conversation()

    def _id(self, record: Mapping[str, Any]) -> str:
        value = record.get("id")
        if value is None:
            return self.id
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise self.error("bad_id", f"`id` must be text or an integer, found {_kind(value)}")
        text = str(value)
        if len(text) > MAX_ID:
            message = f"`id` has {len(text):,} characters, at most {MAX_ID:,} are accepted"
            raise self.error("bad_id", message)
        return self._clean(text, "id")

    def _form(self, record: Mapping[str, Any]) -> Form:
        found = [key for key in FORMAT_KEYS if record.get(key) is not None]
        if len(found) == 1:
            return FORMAT_KEYS[found[0]]
        known = ", ".join(f"`{key}` ({form})" for key, form in FORMAT_KEYS.items())
        if found:
            problem = (
                f"has {' and '.join(found)}; expected one of them, or `format` set for the file"
            )
        else:
            keys = ", ".join(map(str, list(record)[:8])) or "no keys"
            problem = f"none of the known keys {known}; found {keys}"
        raise self.error("format", f"the format cannot be detected: {problem}")

    def _listed_images(self, record: Mapping[str, Any]) -> list[Any]:
        found: list[list[Any]] = []
        for key in ("image", "images"):
            value = record.get(key)
            if value is not None and value != []:
                found.append(value if isinstance(value, list) else [value])
        if len(found) > 1:  # a table's empty column does not count as a second list
            found = [listed for listed in found if not all(map(_is_empty, listed))] or found[:1]
        if len(found) > 1:
            raise self.error("image_field", "has both `image` and `images`; keep one")
        if found and len(found[0]) > MAX_IMAGES:
            message = f"lists {len(found[0]):,} images, at most {MAX_IMAGES:,} are accepted"
            raise self.error("image_count", message)
        return found[0] if found else []

    # --- the formats

    def _read_turns(self, record: Mapping[str, Any], form: Form) -> None:
        key = "conversations" if form == "llava" else "messages"
        turns = record.get(key)
        if not isinstance(turns, list):
            raise self.error("format", f"`{key}` must be a list of turns, found {_kind(turns)}")
        if len(turns) > MAX_TURNS:
            message = f"has {len(turns):,} turns, at most {MAX_TURNS:,} are accepted"
            raise self.error("bad_turn", message)
        for number, turn in enumerate(turns):
            if not isinstance(turn, Mapping):
                message = f"turn {number}: expected an object, found {_kind(turn)}"
                raise self.error("bad_turn", message)
            role = self._role(turn, number)
            self._refuse_tool_calls(turn, number)
            content = _first_of(turn, "value", "content")
            placeholders = role == "user" and (form == "llava" or bool(self.listed))
            parts = self._content(content, number, placeholders)
            separator = self._separator(turn, content, number)
            supervised = self._supervised(turn, role, number)
            self.drafts.append(_Draft(role, parts, supervised, separator))

    def _read_alpaca(self, record: Mapping[str, Any]) -> None:
        instruction, output = record.get("instruction"), record.get("output")
        extra, system = record.get("input"), record.get("system")
        fields = {"instruction": instruction, "output": output}
        fields |= {"input": extra or "", "system": system or ""}
        for name, value in fields.items():
            if not isinstance(value, str):
                raise self.error("bad_turn", f"`{name}` must be text, found {_kind(value)}")
        if record.get("history"):
            raise self.error("format", "Alpaca `history` is not read; write the turns as messages")
        if system:
            self.drafts.append(_Draft("system", self._content(system, 0, False), True))
        question = f"{instruction}\n{extra}" if extra else instruction
        self.drafts.append(_Draft("user", self._content(question, 0, True), True))
        self.drafts.append(_Draft("assistant", self._content(output, 1, False), True))

    # --- one turn

    def _role(self, turn: Mapping[str, Any], number: int) -> Role:
        name = _first_of(turn, "from", "role")
        if isinstance(name, str) and name in ROLES:
            return ROLES[name]
        if name is None:
            message = f"turn {number}: no speaker; expected `from` or `role`"
            raise self.error("unknown_role", message)
        near = difflib.get_close_matches(_quoted(name).strip("'").lower(), ROLES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(ROLES)}"
        raise self.error("unknown_role", f"turn {number}: unknown role {_quoted(name)}; {hint}")

    def _refuse_tool_calls(self, turn: Mapping[str, Any], number: int) -> None:
        for key in ("tool_calls", "function_call"):
            if turn.get(key):
                message = f"turn {number}: `{key}` would be lost; write the call into the text"
                raise self.error("tool_calls", message)

    def _supervised(self, turn: Mapping[str, Any], role: Role, number: int) -> bool:
        loss, weight = turn.get("loss"), turn.get("weight")
        if loss is not None and not isinstance(loss, bool):
            message = f"turn {number}: `loss` must be true or false, found {_quoted(loss)}"
            raise self.error("bad_loss", message)
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            message = f"turn {number}: `weight` must be 0 or 1, found {_quoted(weight)}"
            raise self.error("bad_loss", message)
        if role != "assistant" and (loss or weight):
            message = f"turn {number}: loss on a {role} turn; only answers are trained"
            raise self.error("bad_loss", message)
        return loss is not False and weight != 0

    def _content(self, content: Any, number: int, placeholders: bool) -> "list[_DraftPart]":
        if isinstance(content, str):
            return self._text(content, number, placeholders)
        if not isinstance(content, list):
            message = f"turn {number}: expected text or a list of parts, found {_kind(content)}"
            raise self.error("bad_turn", message)
        parts: list[_DraftPart] = []
        for part in content:
            parts += self._part(part, number)
        return parts

    def _separator(self, turn: Mapping[str, Any], content: Any, number: int) -> str | None:
        """Return the text between an image and its neighbors; None for the template's."""
        separator = turn.get("image_separator")
        if separator is None:
            return None if isinstance(content, list) else ""
        if not isinstance(separator, str) or not isinstance(content, list):
            message = f"turn {number}: `image_separator` must be text next to a list of parts"
            raise self.error("bad_turn", f"{message}, found {separator!r}"[:300])
        return self._clean(separator, f"turn {number}: image_separator")

    def _text(self, text: str, number: int, placeholders: bool) -> "list[_DraftPart]":
        self._clean(text, f"turn {number}")
        pieces = text.split(IMAGE_PLACEHOLDER) if placeholders else [text]
        parts: list[_DraftPart] = []
        for index, piece in enumerate(pieces):
            if index:
                parts.append(_Image())
            if piece:
                parts.append(piece)
        return parts

    def _part(self, part: Any, number: int) -> "list[_DraftPart]":
        if isinstance(part, str):
            return self._text(part, number, False)
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return self._text(part["text"], number, False)
        if kind == "image":
            return [_Image(_first_of(part, "image", "path", "url"))]
        if kind == "image_url":
            url = part.get("image_url")
            return [_Image(url.get("url") if isinstance(url, Mapping) else url)]
        found = f"type {_quoted(kind)}" if kind is not None else _kind(part)
        message = f"turn {number}: expected a part of type text, image or image_url, found {found}"
        raise self.error("bad_turn", message)

    def _clean(self, text: str, place: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            message = f"{place}: half a surrogate pair (U+{code:04X}) is not text"
            raise self.error("bad_text", message) from None
        return text

    # --- the whole record

    def _check_order(self) -> None:
        roles = [draft.role for draft in self.drafts]
        if "assistant" not in roles:
            raise self.error("no_answer", "the conversation has no answer to train on")
        first = 1 if roles[0] == "system" else 0
        for number, role in enumerate(roles[first:], start=first):
            expected = "user" if (number - first) % 2 == 0 else "assistant"
            if role != expected:
                message = f"turn {number} is the {role}'s, expected the {expected}'s"
                raise self.error("role_order", f"{message}; speakers must alternate")
        if roles[-1] != "assistant":
            raise self.error("role_order", "ends with the user's turn, expected an answer")
        for number, draft in enumerate(self.drafts):
            images = any(isinstance(part, _Image) for part in draft.parts)
            if images and draft.role != "user":
                message = f"turn {number}: an image in the {draft.role}'s turn; only users show"
                raise self.error("image_in_answer", f"{message} images")
            if draft.role == "assistant" and not draft.text.strip():
                message = f"turn {number}: the answer is empty; write one or remove the exchange"
                raise self.error("empty_answer", message)

    def _conversation(self) -> Conversation:
        places = [p for d in self.drafts for p in d.parts if isinstance(p, _Image)]
        if len(places) > MAX_IMAGES:
            message = f"has {len(places):,} images, at most {MAX_IMAGES:,} are accepted"
            raise self.error("image_count", message)
        open_places = sum(place.source is None for place in places)
        if not open_places and all(map(_is_empty, self.listed)):
            self.listed = []  # tables have empty values in the image column of text-only rows
        if open_places != len(self.listed):
            message = (
                f"the text has places for {open_places} images ({IMAGE_PLACEHOLDER} or image "
                f"parts), the record lists {len(self.listed)}; they must agree"
            )
            if any(map(_is_empty, self.listed)):
                message += " (an empty image name counts)"
            other = self._other_placeholder()
            if other is not None and open_places < len(self.listed):
                message += f"; {other} is the placeholder of another tool, use {IMAGE_PLACEHOLDER}"
            raise self.error("image_count", message)
        listed = iter(self.listed)
        images: list[ImageSource] = []
        turns: list[Turn] = []
        for draft in self.drafts:
            parts: list[Part] = []
            for part in draft.parts:
                if isinstance(part, _Image):
                    source = next(listed) if part.source is None else part.source
                    parts.append(ImagePart(len(images)))
                    images.append(self._source(source))
                else:
                    parts.append(TextPart(part))
            has_image = any(isinstance(part, ImagePart) for part in parts)
            separator = draft.image_separator if has_image else ""
            turns.append(Turn(draft.role, tuple(parts), draft.supervised, separator))
        return Conversation(self.id, tuple(turns), tuple(images), self.where)

    def _other_placeholder(self) -> str | None:
        """Return the first image placeholder of another tool in a user turn."""
        texts = (d.text for d in self.drafts if d.role == "user")
        found = (match for text in texts if (match := _OTHER_PLACEHOLDERS.search(text)))
        return next((match.group() for match in found), None)

    def _source(self, value: Any) -> ImageSource:
        if _is_empty(value):
            message = "an empty image name; name the image, or remove its place from the text"
            raise self.error("image_field", message)
        if isinstance(value, Mapping):  # an image column: {"bytes": ..., "path": ...}
            value = value["bytes"] if value.get("bytes") else value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            message = f"an image must be a file's name, found {_kind(value)}"
            raise self.error("image_field", message)
        if value.lstrip()[:5].lower() == "data:":
            return self._data_url(value.strip())
        return self._path(value)

    def _data_url(self, url: str) -> bytes:
        head, _, body = url.partition(",")
        try:
            content = base64.b64decode(body, validate=True)
            if not head.lower().endswith(";base64") or not content:
                raise ValueError
            return content
        except (ValueError, binascii.Error):
            message = (
                f"the image {url[:40]!r}... is not a base64 data URL with the content of a file"
            )
            raise self.error("image_field", message) from None

    def _path(self, name: str) -> Path:
        self._clean(name, "image name")
        try:
            return image_path(self.root, name, follow_symlinks=self.follow_symlinks)
        except ImageError as error:
            raise self.error(error.reason, str(error)) from None


@dataclass(frozen=True)
class _Image:
    """The position of an image; without a source it is the next one of the record's list."""

    source: Any = None


_DraftPart = str | _Image


@dataclass(frozen=True)
class _Draft:
    role: Role
    parts: Sequence[_DraftPart] = field(default_factory=list)
    supervised: bool = True
    image_separator: str | None = ""

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


def _first_of(table: Mapping[str, Any], *keys: str) -> Any:
    """Return the first value that is not None; tables have None where a key is absent."""
    return next((table[key] for key in keys if table.get(key) is not None), None)


def _is_empty(value: Any) -> bool:
    """Return whether a value of an image field names no image."""
    if isinstance(value, Mapping):
        return not value.get("bytes") and not value.get("path")
    return value is None or value in ("", b"", [])


def _quoted(value: Any) -> str:
    """Return a short `repr` of a value of any size and depth."""
    return _BOUNDED.repr(value)


def _bounded_repr() -> reprlib.Repr:
    bounded = reprlib.Repr()
    bounded.maxstring = bounded.maxother = bounded.maxlong = 60
    return bounded


_BOUNDED: Final = _bounded_repr()


def _kind(value: Any) -> str:
    """Describe the type of a JSON value, for errors."""
    if value is None:
        return "nothing"
    names = {str: "text", dict: "an object", list: "a list", bool: "true/false"}
    return names.get(type(value), f"the {type(value).__name__} {_quoted(value)}")
