"""Filter records: keep them, drop turns beyond the length limit, skip or quarantine them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_sft.config.schema import DataConfig
from vlm_sft.data.conversation import Conversation, ImagePart, ImageSource
from vlm_sft.data.image_layout import ImageLayout, LayoutRule, Size, num_crops
from vlm_sft.data.ledger import LedgerEntry
from vlm_sft.data.tokenize import CHUNK, ChatTokenizer, TokenizedRecord, batched
from vlm_sft.data.tokenize_cache import CachedChatTokenizer
from vlm_sft.errors import ImageError, RecordError
from vlm_sft.utils.constants import IGNORE_INDEX
from vlm_sft.utils.image_paths import missing_image, split_member


@dataclass(frozen=True)
class FilterResult:
    """The decision about one input record.

    Attributes:
        source: The record as read, or the error that reading it gave.
        entry: The record's line in the ledger.
        record: The record to train on, perhaps with fewer turns than `source`; None if it is not
            used.
        tokenized: Ids and labels of `record`; the first label is always `IGNORE_INDEX`.
        layouts: Layout of each image of `record`.
        sizes: Width and height of each image of `record`; empty where tokens do not depend on them.
        length: Tokens of `record` with every image expanded; 0 if it is not used.
        untruncated: Ids and labels of `source`; None if it could not be tokenized.
        untruncated_layouts: Layout of each image of `source`; empty if it could not be tokenized.
        untruncated_length: Tokens of `source` with every image expanded.
        error: Why the record is quarantined; None for all others.
    """

    source: Conversation | RecordError
    entry: LedgerEntry
    record: Conversation | None = None
    tokenized: TokenizedRecord | None = None
    layouts: tuple[ImageLayout, ...] = ()
    sizes: tuple[Size, ...] = ()
    length: int = 0
    untruncated: TokenizedRecord | None = None
    untruncated_layouts: tuple[ImageLayout, ...] = ()
    untruncated_length: int = 0
    error: RecordError | None = None


class RecordFilter:
    """Tokenizes records and applies a configuration's limits and length policy.

    Args:
        chat_tokenizer: Makes ids and labels. Records that it refuses are quarantined.
        layout_rule: Gives crops and tokens of every image.
        config: `max_length`, `max_crops` and `length_policy` are used.
        look_for_images: Quarantine records that name an image file that does not exist.
        size_of: Returns the size of an image if tokens depend on it; the default reads the header.
            An ImageError quarantines the record.
    """

    def __init__(
        self,
        chat_tokenizer: ChatTokenizer | CachedChatTokenizer,
        *,
        layout_rule: LayoutRule,
        config: DataConfig,
        look_for_images: bool = True,
        size_of: Callable[[ImageSource], Size] | None = None,
    ) -> None:
        self._chat_tokenizer, self._config = chat_tokenizer, config
        self._layout_rule, self._look_for_images = layout_rule, look_for_images
        self._size_of = size_of or _size_of

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
            missing_image(missing[0]),
            record_id=record.id,
            where=record.where,
        )

    def _decide(
        self, source: Conversation, tokenized: TokenizedRecord | RecordError
    ) -> FilterResult:
        if isinstance(tokenized, RecordError):
            return _quarantined(source, tokenized)
        try:
            sizes = self._sizes(source)
        except RecordError as error:
            return _quarantined(source, error)
        untruncated = self._mask_first_label(source, tokenized)
        layouts = self._layouts(source, sizes)
        result = FilterResult(
            source,
            LedgerEntry(source.id, source.where, "trained"),
            untruncated=untruncated,
            untruncated_layouts=layouts,
            untruncated_length=_length(untruncated, layouts),
        )
        try:
            record, kept = self._shorten(source, untruncated, sizes)
        except _TooLong as skipped:
            reason, message = skipped.error.reason, skipped.error.message
            entry = LedgerEntry(source.id, source.where, "skipped", reason, message)
            return replace(result, entry=entry)
        except RecordError as error:
            return replace(result, entry=_quarantine_entry(error), error=error)
        if not kept.num_targets:
            message = "no supervised token is left to train on"
            entry = LedgerEntry(source.id, source.where, "skipped", "no_targets", message)
            return replace(result, entry=entry)
        kept_layouts = self._layouts(record, sizes)
        result = replace(
            result,
            record=record,
            tokenized=kept,
            layouts=kept_layouts,
            sizes=sizes[: len(record.images)],
            length=_length(kept, kept_layouts),
        )
        num_dropped = len(source.turns) - len(record.turns)
        if num_dropped:
            excess = self._excess(source, untruncated, layouts)
            reason = "too_long" if excess is None else excess.reason
            message = f"{num_dropped} of {len(source.turns)} turns dropped"
            entry = LedgerEntry(source.id, source.where, "turns_dropped", reason, message)
            result = replace(result, entry=entry)
        return result

    def _sizes(self, record: Conversation) -> tuple[Size, ...]:
        """Return the sizes of a record's images, if its tokens depend on them.

        Raises:
            RecordError: The header of an image cannot be read.
        """
        if not self._layout_rule.needs_sizes:
            return ()
        try:
            return tuple(self._size_of(image) for image in record.images)
        except ImageError as error:
            raise RecordError(
                error.reason, str(error), record_id=record.id, where=record.where
            ) from None

    def _layouts(self, record: Conversation, sizes: Sequence[Size]) -> tuple[ImageLayout, ...]:
        """Return the layouts of a record's images; `sizes` may have those of dropped ones too."""
        count = len(record.images)
        return self._layout_rule.layouts(sizes[:count] or [(0, 0)] * count)

    def _shorten(
        self, record: Conversation, tokenized: TokenizedRecord, sizes: Sequence[Size]
    ) -> tuple[Conversation, TokenizedRecord]:
        """Return the longest allowed beginning of a record, whole exchanges of it.

        Raises:
            _TooLong: The length policy skips the record.
            RecordError: The length policy is `error`, or a shortened record is refused.
        """
        policy = self._config.length_policy
        shortest = 3 if record.turns[0].role == "system" else 2  # turns
        while excess := self._excess(record, tokenized, self._layouts(record, sizes)):
            if policy != "drop_turns" or len(record.turns) <= shortest:
                break
            record = _without_last_exchange(record)
            # Tokenized and proven again: a cut in the ids could fall into an answer or an image.
            tokenized = self._mask_first_label(record, self._chat_tokenizer.tokenize(record))
        if excess is None:
            return record, tokenized
        if policy == "error":
            raise excess
        raise _TooLong(excess)

    def _excess(
        self, record: Conversation, tokenized: TokenizedRecord, layouts: Sequence[ImageLayout]
    ) -> RecordError | None:
        """Return the error of a record that exceeds a limit; None if it exceeds none."""
        config, length, crops = self._config, _length(tokenized, layouts), num_crops(layouts)
        drops, advice = config.length_policy == "drop_turns", ""
        takes = "its first question and answer take" if drops else "takes"
        if config.length_policy == "error":
            advice = "; raise it, or choose `length_policy: drop_turns` or `skip`"
        if length > config.max_length:
            text = f"{takes} {length:,} tokens, `max_length` is {config.max_length:,}{advice}"
            return RecordError("too_long", text, record_id=record.id, where=record.where)
        if config.max_crops is not None and crops > config.max_crops:
            text = f"{takes} {crops:,} image crops, `max_crops` is {config.max_crops:,}{advice}"
            return RecordError("too_many_crops", text, record_id=record.id, where=record.where)
        return None

    def _mask_first_label(
        self, record: Conversation, tokenized: TokenizedRecord
    ) -> TokenizedRecord:
        assert len(tokenized.input_ids) == len(tokenized.labels)
        assert tokenized.num_images == len(record.images)
        labels = list(tokenized.labels)
        if labels:
            labels[0] = IGNORE_INDEX  # no token comes before it whose logits could predict it
        return replace(tokenized, labels=labels)


class _TooLong(Exception):
    """The length policy skips the record.

    Attributes:
        error: What the record exceeds.
    """

    def __init__(self, error: RecordError) -> None:
        super().__init__(str(error))
        self.error = error


def _length(tokenized: TokenizedRecord, layouts: Sequence[ImageLayout]) -> int:
    return tokenized.expanded_length([layout.num_tokens for layout in layouts])


def _size_of(image: ImageSource) -> Size:
    from vlm_sft.data.images import upright_size  # needs torch

    size = upright_size(image)
    return size.width, size.height


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
        if split_member(path) is None:
            return path.is_file()
        from vlm_sft.utils.tar_index import file_size  # imports pyarrow

        return file_size(path) >= 0
    except (OSError, ValueError):  # a name that is too long or has characters no file can have
        return False
