"""Filter records: keep them, drop turns beyond the length limit, skip or quarantine them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_sft.config.schema import DataConfig
from vlm_sft.data.conversation import Conversation, ImagePart, ImageSource
from vlm_sft.data.ledger import LedgerEntry
from vlm_sft.data.tokenize import CHUNK, ChatTokenizer, TokenizedRecord, batched
from vlm_sft.data.tokenize_cache import CachedChatTokenizer
from vlm_sft.errors import RecordError
from vlm_sft.utils.constants import IGNORE_INDEX


@dataclass(frozen=True)
class FilterResult:
    """The decision about one input record.

    Attributes:
        source: The record as read, or the error that reading it gave.
        entry: The record's line in the ledger.
        record: The record to train on, perhaps with fewer turns than `source`; None if it is not
            used.
        tokenized: Ids and labels of `record`; the first label is always `IGNORE_INDEX`.
        length: Tokens of `record` with every image expanded; 0 if it is not used.
        untruncated: Ids and labels of `source`; None if it could not be tokenized.
        untruncated_length: Tokens of `source` with every image expanded.
        error: Why the record is quarantined; None for all others.
    """

    source: Conversation | RecordError
    entry: LedgerEntry
    record: Conversation | None = None
    tokenized: TokenizedRecord | None = None
    length: int = 0
    untruncated: TokenizedRecord | None = None
    untruncated_length: int = 0
    error: RecordError | None = None


class RecordFilter:
    """Tokenizes records and applies a configuration's length limit and length policy.

    Args:
        chat_tokenizer: Makes ids and labels. Records that it refuses are quarantined.
        num_image_tokens: Tokens that an image takes in the language model's input.
        config: `max_length` and `length_policy` are used.
        look_for_images: Quarantine records that name an image file that does not exist.
    """

    def __init__(
        self,
        chat_tokenizer: ChatTokenizer | CachedChatTokenizer,
        *,
        num_image_tokens: int,
        config: DataConfig,
        look_for_images: bool = True,
    ) -> None:
        self._chat_tokenizer, self._config = chat_tokenizer, config
        self._num_image_tokens, self._look_for_images = num_image_tokens, look_for_images

    def filter(self, record: Conversation | RecordError) -> FilterResult:
        """Return the decision about one record; never raise RecordError."""
        return next(self.filter_all([record]))

    def filter_all(self, records: Iterable[Conversation | RecordError]) -> Iterator[FilterResult]:
        """Yield a decision per record, in order; tokenize `CHUNK` records at once, for speed."""
        for chunk in batched(records, CHUNK):
            checked = [self._require_images(record) for record in chunk]
            valid = [record for record in checked if isinstance(record, Conversation)]
            tokenized = self._chat_tokenizer.tokenize_all(valid)
            for source, record in zip(chunk, checked, strict=True):
                if isinstance(record, RecordError):
                    yield _quarantined(source, record)
                else:
                    yield self._decide(record, next(tokenized))

    def _require_images(self, record: Conversation | RecordError) -> Conversation | RecordError:
        if isinstance(record, RecordError) or not self._look_for_images:
            return record
        missing = missing_images(record.images)
        if not missing:
            return record
        return RecordError(
            "image_missing",
            f"no image file {missing[0]}; check the name and `image_root`",
            record_id=record.id,
            where=record.where,
        )

    def _decide(
        self, source: Conversation, tokenized: TokenizedRecord | RecordError
    ) -> FilterResult:
        if isinstance(tokenized, RecordError):
            return _quarantined(source, tokenized)
        untruncated = self._mask_first_label(source, tokenized)
        result = FilterResult(
            source,
            LedgerEntry(source.id, source.where, "trained"),
            untruncated=untruncated,
            untruncated_length=self._length(untruncated),
        )
        try:
            record, kept = self._shorten(source, untruncated)
        except _TooLong as long:
            entry = LedgerEntry(source.id, source.where, "skipped", "too_long", str(long))
            return replace(result, entry=entry)
        except RecordError as error:
            return replace(result, entry=_quarantine_entry(error), error=error)
        if not kept.num_targets:
            message = "no supervised token is left to train on"
            entry = LedgerEntry(source.id, source.where, "skipped", "no_targets", message)
            return replace(result, entry=entry)
        result = replace(result, record=record, tokenized=kept, length=self._length(kept))
        num_dropped = len(source.turns) - len(record.turns)
        if num_dropped:
            message = f"{num_dropped} of {len(source.turns)} turns dropped"
            entry = LedgerEntry(source.id, source.where, "turns_dropped", "too_long", message)
            result = replace(result, entry=entry)
        return result

    def _shorten(
        self, record: Conversation, tokenized: TokenizedRecord
    ) -> tuple[Conversation, TokenizedRecord]:
        """Return the longest allowed beginning of a record, whole exchanges of it.

        Raises:
            _TooLong: The length policy skips the record.
            RecordError: The length policy is `error`, or a shortened record is refused.
        """
        limit, policy = self._config.max_length, self._config.length_policy
        shortest = 3 if record.turns[0].role == "system" else 2  # turns
        while policy == "drop_turns" and self._length(tokenized) > limit:
            if len(record.turns) <= shortest:
                break
            record = _without_last_exchange(record)
            # Tokenized and proven again: a cut in the ids could fall into an answer or an image.
            tokenized = self._mask_first_label(record, self._chat_tokenizer.tokenize(record))
        length = self._length(tokenized)
        if length <= limit:
            return record, tokenized
        subject = "its first question and answer take" if policy == "drop_turns" else "takes"
        message = f"{subject} {length:,} tokens, `max_length` is {limit:,}"
        if policy != "error":
            raise _TooLong(message)
        message += "; raise it, or choose `length_policy: drop_turns` or `skip`"
        raise RecordError("too_long", message, record_id=record.id, where=record.where)

    def _mask_first_label(
        self, record: Conversation, tokenized: TokenizedRecord
    ) -> TokenizedRecord:
        assert len(tokenized.input_ids) == len(tokenized.labels)
        assert tokenized.num_images == len(record.images)
        labels = list(tokenized.labels)
        if labels:
            labels[0] = IGNORE_INDEX  # no token comes before it whose logits could predict it
        return replace(tokenized, labels=labels)

    def _length(self, tokenized: TokenizedRecord) -> int:
        return tokenized.expanded_length(self._num_image_tokens)


class _TooLong(Exception):
    """The length policy skips the record."""


def missing_images(images: Sequence[ImageSource]) -> list[Path]:
    """Return the image files that do not exist."""
    return [source for source in images if not isinstance(source, bytes) and not _is_file(source)]


def _quarantined(source: Conversation | RecordError, error: RecordError) -> FilterResult:
    return FilterResult(source, _quarantine_entry(error), error=error)


def _quarantine_entry(error: RecordError) -> LedgerEntry:
    return LedgerEntry(error.record_id, error.where, "quarantined", error.reason, str(error))


def _without_last_exchange(record: Conversation) -> Conversation:
    """Return the conversation without its last question and answer and the images in them."""
    turns = record.turns[:-2]
    num_images = sum(isinstance(part, ImagePart) for turn in turns for part in turn.parts)
    return Conversation(record.id, turns, record.images[:num_images], record.where)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long or has characters no file can have
        return False
