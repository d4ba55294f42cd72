"""Count a data set: filtering results, lengths, trained share, special-token look-alikes."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import numpy as np

from vlm_sft.data.conversation import Conversation, TextPart
from vlm_sft.data.filtering import missing_images
from vlm_sft.data.ledger import Bucket
from vlm_sft.data.text_encoder import TextEncoder
from vlm_sft.data.tokenize import TokenizedRecord
from vlm_sft.inspection.records import NO_LIMIT, Inspected, Inspection
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER

BUCKETS: Final[dict[Bucket, str]] = {
    "trained": "trained",
    "turns_dropped": "turns dropped",
    "skipped": "skipped",
    "quarantined": "quarantined",
}
"""Display names of the ledger's buckets."""

FREE_TEXT: Final = "which"
"""Name of the column whose cells can be long."""

OUTCOME_TITLES: Final = ("Records by outcome", "Reasons")
"""Titles of the tables that come first."""

MAX_LISTED: Final = 5
"""Special-token strings that a table lists; the others are counted."""


Count = Literal[
    "trained_tokens",
    "text_tokens",
    "image_tokens",
    "images",
    "missing_images",
    "without_images",
    "too_long",
    "dropped_turns",
    "dropped_tokens",
    "placeholders_in_answers",
    "placeholders_elsewhere",
    "records_with_control",
]
COUNTS: Final[tuple[Count, ...]] = get_args(Count)


@dataclass
class SourceStatistics:
    """Counts of one file, or of all files.

    Lengths are those of every record that can be tokenized, before turns are dropped. Token counts
    are those of the records that training uses, in the form in which it uses them.

    Attributes:
        name: Name of the file.
        outcomes: Records per bucket and reason of the ledger.
        lengths: Tokens of each record, image tokens included.
        text_lengths: Tokens of each record, without image tokens.
        shares: Trained tokens of each used record, divided by its text tokens.
        special_strings: Occurrences of strings in the data that are names of special tokens.
        counts: All other counts, by their names in the JSON output.
    """

    name: str
    outcomes: Counter[tuple[Bucket, str]] = field(default_factory=Counter)
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    text_lengths: "array[int]" = field(default_factory=lambda: array("q"))
    shares: "array[float]" = field(default_factory=lambda: array("d"))
    special_strings: Counter[str] = field(default_factory=Counter)
    counts: Counter[Count] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))

    @property
    def records(self) -> int:
        """Number of records, used or not."""
        return self.outcomes.total()

    def count(self, bucket: Bucket) -> int:
        """Return the number of records in a bucket of the ledger."""
        return sum(n for (found, _), n in self.outcomes.items() if found == bucket)

    def add(self, found: Inspected, encoder: TextEncoder, max_length: int) -> None:
        """Add one record to the counts."""
        self.outcomes[found.bucket, found.entry.reason] += 1
        if isinstance(found.record, Conversation):
            self._add_content(found.record, encoder)
        result = found.result
        if result.untruncated is not None:
            self.lengths.append(result.untruncated_length)
            self.text_lengths.append(_text_length(result.untruncated))
            self.counts["too_long"] += result.untruncated_length > max_length
        if result.tokenized is not None:
            self._add_trained(result.tokenized, result.length)
        if result.record is not None and found.bucket == "turns_dropped":
            assert isinstance(found.record, Conversation)
            self.counts["dropped_turns"] += len(found.record.turns) - len(result.record.turns)
            self.counts["dropped_tokens"] += result.untruncated_length - result.length

    def _add_trained(self, tokenized: TokenizedRecord, length: int) -> None:
        text_length = _text_length(tokenized)
        self.counts["trained_tokens"] += tokenized.num_targets
        self.counts["text_tokens"] += text_length
        self.counts["image_tokens"] += length - text_length
        self.shares.append(tokenized.num_targets / text_length)

    def _add_content(self, record: Conversation, encoder: TextEncoder) -> None:
        self.counts["images"] += len(record.images)
        self.counts["missing_images"] += len(missing_images(record.images))
        self.counts["without_images"] += not record.images
        special: list[str] = []
        for turn in record.turns:
            texts = [part.text for part in turn.parts if isinstance(part, TextPart)]
            placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
            in_answer = turn.role == "assistant"
            self.counts["placeholders_in_answers" if in_answer else "placeholders_elsewhere"] += (
                placeholders
            )
            special += [found for text in texts for found in encoder.find_special_tokens(text)]
        self.special_strings.update(special)
        self.counts["records_with_control"] += bool(special)

    def include(self, other: "SourceStatistics") -> None:
        """Add the counts of another file."""
        self.outcomes.update(other.outcomes)
        self.lengths.extend(other.lengths)
        self.text_lengths.extend(other.text_lengths)
        self.shares.extend(other.shares)
        self.special_strings.update(other.special_strings)
        self.counts.update(other.counts)

    def as_json(self) -> dict[str, Any]:
        """Return plain values, for other programs."""
        outcomes = {bucket: self.count(bucket) for bucket in BUCKETS}
        reasons = {f"{b}: {r}": n for (b, r), n in sorted(self.outcomes.items()) if r}
        return {
            "name": self.name,
            "records": self.records,
            "outcomes": outcomes,
            "reasons": reasons,
            "length_with_image_tokens": spread(self.lengths),
            "length_without_image_tokens": spread(self.text_lengths),
            **{str(name): count for name, count in self.counts.items()},
            "control_strings": dict(sorted(self.special_strings.items())),
        }


@dataclass
class Statistics:
    """Counts of each file and of all files.

    Args:
        inspection: The files and the length limit.
    """

    inspection: Inspection
    sources: list[SourceStatistics] = field(init=False)

    def __post_init__(self) -> None:
        self.sources = [SourceStatistics(name) for name in self.inspection.names()]

    def add(self, found: Inspected) -> None:
        """Add one record to the counts of its file."""
        encoder, limit = self.inspection.chat_tokenizer.encoder, self.inspection.config.max_length
        self.sources[found.source].add(found, encoder, limit)

    @property
    def total(self) -> SourceStatistics:
        """The sum of all files."""
        total = SourceStatistics("all files")
        for source in self.sources:
            total.include(source)
        return total

    def as_json(self) -> dict[str, Any]:
        """Return plain values, for other programs."""
        limit, rule = self.inspection.config.max_length, self.inspection.layout_rule
        return {
            "image_tokens_per_image": None if rule.needs_sizes else rule.crop_tokens,
            "image_tokens": rule.describe(),
            "max_length": None if limit == NO_LIMIT else limit,
            "length_policy": self.inspection.config.length_policy,
            "total": self.total.as_json(),
            "sources": [source.as_json() for source in self.sources],
        }

    def tables(self) -> list["FigureTable"]:
        """Return the figures as tables, with a row per file, and one for all files if several."""
        rows = [*self.sources, *([self.total] if len(self.sources) > 1 else [])]
        not_all_used = [row for row in self.sources if row.outcomes.keys() - {("trained", "")}]
        not_all_used += [self.total] if len(not_all_used) > 1 else []
        tables = [_outcomes(rows), _reasons(not_all_used), _tokens(rows), _lengths(rows)]
        if self.inspection.config.max_length != NO_LIMIT:
            tables.append(_truncation(rows, self.inspection.config.max_length))
        tables.append(_lookalikes(rows))
        return [table for table in tables if table.rows]


@dataclass(frozen=True)
class FigureTable:
    """A titled table of text, with a note on what was counted."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def is_number(self, column: int) -> bool:
        """Return whether all cells of a column are numbers, which are aligned to the right."""
        return all(row[column][:1].isdigit() or not row[column] for row in self.rows)


def _outcomes(rows: Sequence[SourceStatistics]) -> FigureTable:
    columns = ["file", "records", *BUCKETS.values(), "images", "files missing", "without image"]
    lines = [
        [
            row.name,
            _n(row.records),
            *(_n(row.count(bucket)) for bucket in BUCKETS),
            _n(row.counts["images"]),
            _n(row.counts["missing_images"]),
            _n(row.counts["without_images"]),
        ]
        for row in rows
    ]
    note = "Each record counts once. Images are counted in all records that can be read."
    return FigureTable(OUTCOME_TITLES[0], columns, lines, note)


def _reasons(rows: Sequence[SourceStatistics]) -> FigureTable:
    lines = [
        [row.name, BUCKETS[bucket], reason, _n(count)]
        for row in rows
        for (bucket, reason), count in sorted(row.outcomes.items())
        if bucket != "trained"
    ]
    return FigureTable(OUTCOME_TITLES[1], ["file", "outcome", "reason", "records"], lines)


def _tokens(rows: Sequence[SourceStatistics]) -> FigureTable:
    columns = [
        "file",
        "trained tokens",
        "text tokens",
        "image tokens",
        "% of text trained",
        "% of all",
    ]
    lines = [
        [
            row.name,
            _n(trained),
            _n(text),
            _n(image),
            _percent(trained, text),
            _percent(trained, text + image),
        ]
        for row in rows
        for trained, text, image in [
            (row.counts["trained_tokens"], row.counts["text_tokens"], row.counts["image_tokens"])
        ]
    ]
    note = "Counted in the records that training uses, after turns are dropped, for one epoch."
    return FigureTable("Trained share", columns, lines, note)


def _lengths(rows: Sequence[SourceStatistics]) -> FigureTable:
    lines = []
    for row in rows:
        for what, lengths in (("without", row.text_lengths), ("with", row.lengths)):
            if lengths:
                lines.append([row.name, what, *map(_n, spread(lengths).values())])
    columns = ["file", "image tokens", "shortest", "median", "95th percentile", "longest"]
    note = "Counted in every record that can be tokenized, before turns are dropped."
    return FigureTable("Tokens per record", columns, lines, note)


def _truncation(rows: Sequence[SourceStatistics], limit: int) -> FigureTable:
    columns = ["file", f"longer than {limit:,}", "% of all", "shortened", "turns dropped"]
    columns += ["tokens dropped", "not used"]
    lines = []
    for row in rows:
        not_used = sum(
            n
            for (bucket, reason), n in row.outcomes.items()
            if reason == "too_long" and bucket != "turns_dropped"
        )
        lines.append(
            [
                row.name,
                _n(row.counts["too_long"]),
                _percent(row.counts["too_long"], len(row.lengths)),
                _n(row.count("turns_dropped")),
                _n(row.counts["dropped_turns"]),
                _n(row.counts["dropped_tokens"]),
                _n(not_used),
            ]
        )
    return FigureTable("Records longer than max_length", columns, lines)


def _lookalikes(rows: Sequence[SourceStatistics]) -> FigureTable:
    columns = ["file", f"{IMAGE_PLACEHOLDER} in answers", f"{IMAGE_PLACEHOLDER} elsewhere"]
    columns += ["special-token strings", "in records", FREE_TEXT]
    lines = [
        [
            row.name,
            _n(row.counts["placeholders_in_answers"]),
            _n(row.counts["placeholders_elsewhere"]),
            _n(row.special_strings.total()),
            _n(row.counts["records_with_control"]),
            _most_common(row.special_strings),
        ]
        for row in rows
    ]
    note = (
        "Strings in the data; they are encoded as ordinary text, not as images or special tokens."
    )
    return FigureTable("Text that looks like a special token", columns, lines, note)


def _most_common(found: Counter[str]) -> str:
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{text} {count:,}" for text, count in ordered[:MAX_LISTED]]
    more = len(ordered) - MAX_LISTED
    return ", ".join(named + ([f"{more} more"] if more > 0 else []))


def _text_length(tokenized: TokenizedRecord) -> int:
    return len(tokenized.input_ids) - tokenized.num_images


def spread(lengths: Sequence[int]) -> dict[str, int]:
    """Return shortest, median, 95th percentile and longest; each is the length of a record."""
    if not len(lengths):
        return {}
    ordered = np.sort(np.asarray(lengths))
    places = np.percentile(ordered, [0, 50, 95, 100], method="inverted_cdf")
    return dict(zip(("shortest", "median", "p95", "longest"), map(int, places), strict=True))


def _n(number: int) -> str:
    return f"{number:,}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
