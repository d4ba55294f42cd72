"""Write one HTML page of records: images, turns, trained tokens, figures, search and filters."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vlm_sft.data.conversation import Conversation, ImagePart, ImageSource, Turn
from vlm_sft.data.images import open_image
from vlm_sft.errors import ImageError
from vlm_sft.inspection.plots import lengths_histogram, shares_histogram
from vlm_sft.inspection.records import NO_LIMIT, Inspected, Inspection
from vlm_sft.inspection.statistics import (
    BUCKETS,
    FREE_TEXT,
    OUTCOME_TITLES,
    SourceStatistics,
    Statistics,
    spread,
)
from vlm_sft.inspection.terminal import message
from vlm_sft.inspection.tokens import TokenSpan, TokenView, view_tokens
from vlm_sft.utils.atomic_files import write_text
from vlm_sft.utils.html import data_uri, render_page

THUMBNAIL_SIZE: Final = 256
"""Longest side of an embedded image in pixels."""


@dataclass(frozen=True)
class Thumbnail:
    """An embedded image, or the error of one that cannot be opened."""

    number: int
    uri: str = ""
    width: int = 0
    height: int = 0
    caption: str = ""
    error: str = ""


@dataclass(frozen=True)
class RecordView:
    """What the page shows of one record.

    Attributes:
        found: The record and its filtering result.
        where: File and position of the record.
        counts: Numbers of tokens, images and turns; "" if the record cannot be tokenized.
        images: The record's images in order.
        exchanges: One list of spans for each answer with the prompt before it.
        turns: Turns as read, for a record that cannot be tokenized.
        dropped: Turns at the end that do not fit into `max_length`.
    """

    found: Inspected
    where: str
    counts: str
    images: Sequence[Thumbnail]
    exchanges: Sequence[Sequence[TokenSpan]]
    turns: Sequence[Turn]
    dropped: Sequence[Turn]

    @property
    def message(self) -> str:
        """The reason why the record is not used as it is."""
        return message(self.found)

    @property
    def dropped_title(self) -> str:
        """How many turns and images were dropped."""
        images = sum(isinstance(part, ImagePart) for turn in self.dropped for part in turn.parts)
        return f"{len(self.dropped)} turns dropped" + (f" with {images} images" if images else "")


@dataclass
class RecordsPage:
    """Collect records and write them as a page.

    Args:
        inspection: Source of the records.
        limit: Maximum number of records on the page; further ones are only counted.
        selection: The options that selected records, as typed; "" for all records.
    """

    inspection: Inspection
    limit: int
    selection: str = ""
    num_matching: int = 0
    _records: list[RecordView] = field(default_factory=list)

    @property
    def num_shown(self) -> int:
        """Number of records on the page."""
        return len(self._records)

    def add(self, found: Inspected) -> None:
        """Count a record, and show it unless the limit is reached."""
        self.num_matching += 1
        if self.num_shown >= self.limit:
            return
        inspection = self.inspection
        view = view_tokens(found, inspection.chat_tokenizer, inspection.layout_rule)
        file_path = inspection.files[found.source].path
        self._records.append(record_view(found, view, file_path))

    def write(self, path: str | Path, statistics: Statistics) -> None:
        """Write the page; the same records and figures give the same bytes.

        Raises:
            OSError: The file cannot be written; an existing one is unchanged.
        """
        tables = statistics.tables()
        max_length = statistics.inspection.config.max_length
        html = render_page(
            __package__,
            "records.html",
            title=f"Records of {', '.join(self.inspection.names())}",
            lead=self._lead(),
            command="show",
            styles=["records.css"],
            script="records.js",
            warning=self._warning(statistics),
            headline=_headline(statistics.total),
            lengths_plot=data_uri(lengths_histogram(statistics.total, max_length)),
            shares_plot=data_uri(shares_histogram(statistics.total)),
            tables=[table for table in tables if table.title in OUTCOME_TITLES],
            more_tables=[table for table in tables if table.title not in OUTCOME_TITLES],
            free_text=FREE_TEXT,
            num_shown=self.num_shown,
            num_matching=self.num_matching,
            selection=self.selection,
            filters=self._filters(),
            records=self._records,
            buckets=BUCKETS,
        )
        write_text(path, html)

    def _lead(self) -> str:
        inspection = self.inspection
        config = inspection.config
        parts = [f"Template {inspection.chat_tokenizer.template.name}"]
        parts.append(inspection.layout_rule.describe())
        if config.max_length == NO_LIMIT:
            parts.append("no length limit")
        else:
            parts.append(f"max_length {config.max_length:,}, length_policy {config.length_policy}")
        return "; ".join(parts) + "."

    def _warning(self, statistics: Statistics) -> str:
        num_faulty = statistics.total.count("quarantined")
        stops = self.inspection.config.on_error != "quarantine"
        if not num_faulty or not self.inspection.look_for_images or not stops:
            return ""
        return (
            f"data.on_error is stop: training would end at the first of the {num_faulty:,} "
            "quarantined records."
        )

    def _filters(self) -> list[list[tuple[str, str, str, int]]]:
        """Return groups of buttons as (kind, value, label, number of records).

        A group with one button would filter nothing and is left out.
        """
        names = self.inspection.names()
        sources = Counter(record.found.source for record in self._records)
        buckets = Counter(record.found.bucket for record in self._records)
        by_source = [("source", str(i), names[i], count) for i, count in sorted(sources.items())]
        by_bucket = [
            ("outcome", str(bucket), label, buckets[bucket])
            for bucket, label in BUCKETS.items()
            if buckets[bucket]
        ]
        return [group for group in (by_source, by_bucket) if len(group) > 1]


def record_view(found: Inspected, view: TokenView | None, file_path: str) -> RecordView:
    """Return what the page shows of a record.

    Args:
        found: The record.
        view: Its tokens; None if it cannot be tokenized.
        file_path: File of the record.
    """
    conversation, where = found.conversation, found.entry.where
    dropped: Sequence[Turn] = ()
    if found.bucket == "turns_dropped" and isinstance(found.record, Conversation):
        assert found.result.record is not None
        dropped = found.record.turns[len(found.result.record.turns) :]
    return RecordView(
        found,
        where=where if file_path in where else f"{where} of {file_path}",
        counts=_counts(view, conversation) if view is not None and conversation is not None else "",
        images=[_thumbnail(s, i) for i, s in enumerate(conversation.images, 1)]
        if conversation is not None
        else [],
        exchanges=_exchanges(view) if view is not None else [],
        turns=conversation.turns if view is None and conversation is not None else (),
        dropped=dropped,
    )


def _counts(view: TokenView, conversation: Conversation) -> str:
    turns, images, trained = len(conversation.turns), view.num_images, view.num_trained
    share = f" ({100 * trained / view.num_text_tokens:.0f} %)" if trained else ""
    return (
        f"{view.num_text_tokens:,} tokens, {view.length:,} with image tokens · "
        f"{trained:,} trained{share} · {images} image{'' if images == 1 else 's'} · "
        f"{turns} turn{'' if turns == 1 else 's'}"
    )


def _exchanges(view: TokenView) -> list[list[TokenSpan]]:
    """Group spans into one block for each answer, with the prompt before it.

    What follows the last answer stays in the last block. The newline that templates write after an
    answer also belongs to that answer's block, not to the next one.
    """
    blocks: list[list[TokenSpan]] = [[]]
    after_answer = False
    for number, span in enumerate(view.spans):
        is_last = number == len(view.spans) - 1
        if after_answer and not is_last:
            newline, span = _split_leading_space(span)
            blocks[-1].append(newline)
            blocks.append([])
        blocks[-1].append(span)
        after_answer = span.kind != "context"
    return [[span for span in block if span.tokens] for block in blocks]


def _split_leading_space(span: TokenSpan) -> tuple[TokenSpan, TokenSpan]:
    """Split a whitespace token off the front of a context span; the first part may be empty."""
    is_space = bool(span.tokens) and not span.tokens[0].text.strip()
    cut = int(is_space and span.kind == "context")
    return TokenSpan(span.kind, span.tokens[:cut]), TokenSpan(span.kind, span.tokens[cut:])


def _thumbnail(source: ImageSource, number: int) -> Thumbnail:
    name = "embedded in the record" if isinstance(source, bytes) else source.name
    try:
        image = open_image(source)
    except ImageError as error:
        return Thumbnail(number, error=str(error))
    width, height = image.size
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    uri = data_uri(buffer.getvalue(), "jpeg")
    caption = f"{number}: {name}, {width} x {height}"
    return Thumbnail(number, uri, image.width, image.height, caption)


def _headline(total: SourceStatistics) -> list[tuple[str, str]]:
    """Return the main figures and their captions."""
    trained = total.count("trained") + total.count("turns_dropped")
    cells = [(f"{trained:,} of {total.records:,}", "records are used for training")]
    trained_tokens, text_tokens = total.counts["trained_tokens"], total.counts["text_tokens"]
    if text_tokens:
        share = f"{100 * trained_tokens / text_tokens:.1f} %"
        cells.append((share, f"of their text tokens are trained: {trained_tokens:,}"))
    if total.lengths:
        lengths = spread(total.lengths)
        caption = f"tokens per record (median, image tokens included); max {lengths['longest']:,}"
        cells.append((f"{lengths['median']:,}", caption))
    return cells
