"""What becomes of each record: trained on whole, shortened, or left out, and why."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vlm_sft.config.schema import DataConfig
from vlm_sft.data.conversation import Conversation, ImagePart, ImageSource
from vlm_sft.data.ledger import Bucket, Entry
from vlm_sft.data.tokenize import CHUNK, batched
from vlm_sft.errors import RecordError
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID


class RenderedRecord(Protocol):
    """Ids and labels of equal length, one `IMAGE_TOKEN_ID` an image."""

    @property
    def input_ids(self) -> list[int]: ...

    @property
    def labels(self) -> list[int]: ...


class RecordRenderer(Protocol):
    """Makes ids and labels of conversations (`data/masking.py`)."""

    def render(self, conversation: Conversation) -> RenderedRecord: ...

    def render_all(
        self, conversations: Iterable[Conversation]
    ) -> Iterator[RenderedRecord | RecordError]: ...


@dataclass(frozen=True)
class Rendering:
    """A record's ids and labels with its true length.

    Attributes:
        input_ids: One `IMAGE_TOKEN_ID` an image.
        labels: `IGNORE_INDEX` where nothing is trained, always at the first position.
        length: Tokens, image tokens included.
    """

    input_ids: list[int]
    labels: list[int]
    length: int

    @property
    def num_targets(self) -> int:
        """Trained tokens."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


@dataclass(frozen=True)
class Outcome:
    """One record's end.

    Attributes:
        record: As read, or why it could not be.
        entry: The line of the ledger.
        kept: The record as it is trained on; None if it is not.
        rendering: Of `kept`.
        whole: Of the record before turns were dropped; None where it could not be rendered.
        error: Of a quarantined record.
    """

    record: Conversation | RecordError
    entry: Entry
    kept: Conversation | None = None
    rendering: Rendering | None = None
    whole: Rendering | None = None
    error: RecordError | None = None


class Admission:
    """Decides about records, by a configuration's length limit and policy.

    Args:
        renderer: Makes ids and labels; its RecordErrors are handled like the reader's.
        num_image_tokens: Features the tower gives for an image.
        config: `max_length` and `length_policy` count.
        look_for_images: A record with an image whose file is not there is faulty.
    """

    def __init__(
        self,
        renderer: RecordRenderer,
        *,
        num_image_tokens: int,
        config: DataConfig,
        look_for_images: bool = True,
    ) -> None:
        self._renderer, self._config = renderer, config
        self._num_image_tokens, self._look = num_image_tokens, look_for_images

    def decide(self, record: Conversation | RecordError) -> Outcome:
        """The record's end; never raises RecordError."""
        return next(self.decide_all([record]))

    def decide_all(self, records: Iterable[Conversation | RecordError]) -> Iterator[Outcome]:
        """As `decide`, for many: faster, in order, reading a few hundred records ahead."""
        for chunk in batched(records, CHUNK):
            faults = [self._fault(record) for record in chunk]
            pairs = zip(chunk, faults, strict=True)
            sound = [r for r, fault in pairs if fault is None and isinstance(r, Conversation)]
            rendered = self._renderer.render_all(sound)
            for record, fault in zip(chunk, faults, strict=True):
                if isinstance(record, RecordError) or fault is not None:
                    yield _quarantined(record, fault)
                else:
                    yield self._decide(record, next(rendered))

    def _fault(self, record: Conversation | RecordError) -> RecordError | None:
        """What is known to be wrong before rendering."""
        if isinstance(record, RecordError):
            return record
        return _image_fault(record) if self._look else None

    def _decide(self, record: Conversation, rendered: RenderedRecord | RecordError) -> Outcome:
        if isinstance(rendered, RecordError):
            return _quarantined(record, rendered)
        whole = self._measured(record, rendered)
        try:
            kept, rendering = self._shorten(record, whole)
        except _TooLong as long:
            entry = _entry(record, "skipped", "too_long", str(long))
            return Outcome(record, entry, whole=whole)
        except RecordError as error:
            return _quarantined(record, error, whole)
        if not rendering.num_targets:
            message = "no supervised token is left to train on"
            return Outcome(record, _entry(record, "skipped", "no_targets", message), whole=whole)
        dropped = len(record.turns) - len(kept.turns)
        if not dropped:
            return Outcome(record, _entry(record, "trained"), kept, rendering, whole)
        message = f"{dropped} of {len(record.turns)} turns dropped"
        entry = _entry(record, "turns_dropped", "too_long", message)
        return Outcome(record, entry, kept, rendering, whole)

    def _measured(self, record: Conversation, rendered: RenderedRecord) -> Rendering:
        ids, labels = rendered.input_ids, list(rendered.labels)
        if labels:
            labels[0] = IGNORE_INDEX  # nothing comes before it that could predict it
        num_images = ids.count(IMAGE_TOKEN_ID)
        assert len(ids) == len(labels) and num_images == len(record.images)
        return Rendering(ids, labels, len(ids) + num_images * (self._num_image_tokens - 1))

    def _shorten(
        self, record: Conversation, rendering: Rendering
    ) -> tuple[Conversation, Rendering]:
        limit, policy = self._config.max_length, self._config.length_policy
        kept, first = record, 1 if record.turns[0].role == "system" else 0
        while policy == "drop_turns" and rendering.length > limit and len(kept.turns) > first + 2:
            kept = _without_last_exchange(kept)
            rendering = self._measured(kept, self._renderer.render(kept))
        if rendering.length <= limit:
            return kept, rendering
        what = "its first question and answer take" if policy == "drop_turns" else "takes"
        message = f"{what} {rendering.length:,} tokens, `max_length` is {limit:,}"
        if policy != "error":
            raise _TooLong(message)
        message += "; raise it, or choose `length_policy: drop_turns` or `skip`"
        raise RecordError("too_long", message, record_id=record.id, where=record.where)


class _TooLong(Exception):
    """The record is left out by the length policy."""


def missing_images(images: Sequence[ImageSource]) -> list[Path]:
    """The images whose files are not there."""
    return [source for source in images if not isinstance(source, bytes) and not _is_file(source)]


def _image_fault(record: Conversation) -> RecordError | None:
    missing = missing_images(record.images)
    if not missing:
        return None
    return RecordError(
        "image_missing",
        f"no image file {missing[0]}; check the name and `image_root`",
        record_id=record.id,
        where=record.where,
    )


def _quarantined(
    record: Conversation | RecordError, fault: RecordError | None, whole: Rendering | None = None
) -> Outcome:
    error = record if isinstance(record, RecordError) else fault
    assert error is not None
    entry = Entry(error.record_id, error.where, "quarantined", error.reason, str(error))
    return Outcome(record, entry, whole=whole, error=error)


def _entry(record: Conversation, bucket: Bucket, reason: str = "", message: str = "") -> Entry:
    return Entry(record.id, record.where, bucket, reason, message)


def _without_last_exchange(record: Conversation) -> Conversation:
    """The conversation without its last question and answer and the images in them."""
    turns = record.turns[:-2]
    num_images = sum(isinstance(part, ImagePart) for turn in turns for part in turn.parts)
    return Conversation(record.id, turns, record.images[:num_images], record.where)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or of characters no name can have
        return False
