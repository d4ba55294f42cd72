"""Figures about a data set: what becomes of its records, how long they are, how much is trained."""

import io
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from vlm_sft.data.conversation import Conversation, TextPart
from vlm_sft.data.filtering import Rendering, missing_images
from vlm_sft.data.ledger import Bucket
from vlm_sft.data.text_encoder import TextEncoder
from vlm_sft.inspection.records import NO_LIMIT, Inspected, Inspection
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID

BUCKETS: Final[dict[Bucket, str]] = {
    "trained": "trained",
    "turns_dropped": "turns dropped",
    "skipped": "skipped",
    "quarantined": "quarantined",
}
"""Buckets of the ledger, as people read them."""

FREE_TEXT: Final = "which"
"""The column whose cells may be long."""

OUTCOME_TITLES: Final = ("What becomes of the records", "Why")
"""The tables that come first."""

MOST_NAMED: Final = 5
"""Control strings that are named in a table; the rest is counted."""


@dataclass
class SourceStatistics:
    """Counts of one file, or of all of them.

    Lengths are of every record that can be rendered, before turns are dropped; trained and read
    tokens are of the records that are trained on, as they are trained on.
    """

    name: str
    outcomes: Counter[tuple[Bucket, str]] = field(default_factory=Counter)
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    """Tokens a record, image tokens included."""
    text_lengths: "array[int]" = field(default_factory=lambda: array("q"))
    """Tokens a record, image tokens left out."""
    shares: "array[float]" = field(default_factory=lambda: array("d"))
    """Trained tokens of each trained record / its tokens without image tokens."""
    trained_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    images: int = 0
    missing_images: int = 0
    without_images: int = 0
    too_long: int = 0
    dropped_turns: int = 0
    dropped_tokens: int = 0
    placeholders_in_answers: int = 0
    placeholders_elsewhere: int = 0
    control_strings: Counter[str] = field(default_factory=Counter)
    records_with_control: int = 0

    @property
    def records(self) -> int:
        """Records of the files, whatever became of them."""
        return self.outcomes.total()

    def count(self, bucket: Bucket) -> int:
        """Records in a bucket of the ledger."""
        return sum(n for (found, _), n in self.outcomes.items() if found == bucket)

    def add(self, found: Inspected, encoder: TextEncoder, max_length: int) -> None:
        """Count one record in."""
        self.outcomes[found.bucket, found.entry.reason] += 1
        if isinstance(found.record, Conversation):
            self._add_content(found.record, encoder)
        whole, rendering = found.outcome.whole, found.outcome.rendering
        if whole is not None:
            self.lengths.append(whole.length)
            self.text_lengths.append(_text_length(whole))
            self.too_long += whole.length > max_length
        if rendering is not None:
            self._add_trained(rendering)
        if rendering is not None and whole is not None and found.bucket == "turns_dropped":
            assert isinstance(found.record, Conversation) and found.outcome.kept is not None
            self.dropped_turns += len(found.record.turns) - len(found.outcome.kept.turns)
            self.dropped_tokens += whole.length - rendering.length

    def _add_trained(self, rendering: Rendering) -> None:
        text_length = _text_length(rendering)
        self.trained_tokens += rendering.num_targets
        self.text_tokens += text_length
        self.image_tokens += rendering.length - text_length
        self.shares.append(rendering.num_targets / text_length)

    def _add_content(self, record: Conversation, encoder: TextEncoder) -> None:
        self.images += len(record.images)
        self.missing_images += len(missing_images(record.images))
        self.without_images += not record.images
        spelled: list[str] = []
        for turn in record.turns:
            texts = [part.text for part in turn.parts if isinstance(part, TextPart)]
            placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
            if turn.role == "assistant":
                self.placeholders_in_answers += placeholders
            else:
                self.placeholders_elsewhere += placeholders
            spelled += [found for text in texts for found in encoder.find_control(text)]
        self.control_strings.update(spelled)
        self.records_with_control += bool(spelled)

    def include(self, other: "SourceStatistics") -> None:
        """Add another's counts to these."""
        for key, value in vars(other).items():
            if key == "name":
                continue
            mine = getattr(self, key)
            if isinstance(mine, Counter):
                mine.update(value)
            else:
                setattr(self, key, mine + value)

    def as_json(self) -> dict[str, Any]:
        """Plain values for other programs."""
        outcomes = {bucket: self.count(bucket) for bucket in BUCKETS}
        reasons = {f"{b}: {r}": n for (b, r), n in sorted(self.outcomes.items()) if r}
        counts = {key: value for key, value in vars(self).items() if isinstance(value, int)}
        return {
            "name": self.name,
            "records": self.records,
            "outcomes": outcomes,
            "reasons": reasons,
            "length_with_image_tokens": spread(self.lengths),
            "length_without_image_tokens": spread(self.text_lengths),
            **counts,
            "control_strings": dict(sorted(self.control_strings.items())),
        }


@dataclass
class Statistics:
    """Figures of each file and of all of them.

    Args:
        inspection: Its files and limits.
    """

    inspection: Inspection
    sources: list[SourceStatistics] = field(init=False)

    def __post_init__(self) -> None:
        self.sources = [SourceStatistics(name) for name in self.inspection.names()]

    def add(self, found: Inspected) -> None:
        """Count one record in."""
        encoder, limit = self.inspection.renderer.encoder, self.inspection.config.max_length
        self.sources[found.source].add(found, encoder, limit)

    @property
    def total(self) -> SourceStatistics:
        """All files together."""
        total = SourceStatistics("all files")
        for source in self.sources:
            total.include(source)
        return total

    def as_json(self) -> dict[str, Any]:
        """Plain values for other programs."""
        limit = self.inspection.config.max_length
        return {
            "image_tokens_per_image": self.inspection.num_image_tokens,
            "max_length": None if limit == NO_LIMIT else limit,
            "length_policy": self.inspection.config.length_policy,
            "total": self.total.as_json(),
            "sources": [source.as_json() for source in self.sources],
        }

    def tables(self) -> list["FigureTable"]:
        """The figures in words: a line a file, and one for all where there are several."""
        rows = [*self.sources, *([self.total] if len(self.sources) > 1 else [])]
        explained = [row for row in self.sources if row.outcomes.keys() - {("trained", "")}]
        explained += [self.total] if len(explained) > 1 else []
        tables = [_outcomes(rows), _reasons(explained), _tokens(rows), _lengths(rows)]
        if self.inspection.config.max_length != NO_LIMIT:
            tables.append(_truncation(rows, self.inspection.config.max_length))
        tables.append(_lookalikes(rows))
        return [table for table in tables if table.rows]


@dataclass(frozen=True)
class FigureTable:
    """A titled table of text, with a note that says what was counted."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def is_number(self, column: int) -> bool:
        """Whether all of a column's cells are figures, so that they are aligned at the right."""
        return all(row[column][:1].isdigit() or not row[column] for row in self.rows)


def _outcomes(rows: Sequence[SourceStatistics]) -> FigureTable:
    columns = ["file", "records", *BUCKETS.values(), "images", "files missing", "without image"]
    lines = [
        [
            row.name,
            _n(row.records),
            *(_n(row.count(bucket)) for bucket in BUCKETS),
            _n(row.images),
            _n(row.missing_images),
            _n(row.without_images),
        ]
        for row in rows
    ]
    note = "Each record counts once; images are those of the records that can be read."
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
    columns = ["file", "trained tokens", "text tokens", "image tokens", "trained of text", "of all"]
    lines = [
        [
            row.name,
            _n(row.trained_tokens),
            _n(row.text_tokens),
            _n(row.image_tokens),
            _percent(row.trained_tokens, row.text_tokens),
            _percent(row.trained_tokens, row.text_tokens + row.image_tokens),
        ]
        for row in rows
    ]
    note = "Of the records that are trained on, as they are trained on; each record once."
    return FigureTable("Supervised share", columns, lines, note)


def _lengths(rows: Sequence[SourceStatistics]) -> FigureTable:
    lines = []
    for row in rows:
        for what, lengths in (("without", row.text_lengths), ("with", row.lengths)):
            if lengths:
                lines.append([row.name, what, *map(_n, spread(lengths).values())])
    columns = ["file", "image tokens", "shortest", "median", "95 %", "longest"]
    note = "Of every record that can be rendered, before turns are dropped."
    return FigureTable("Tokens a record", columns, lines, note)


def _truncation(rows: Sequence[SourceStatistics], limit: int) -> FigureTable:
    columns = ["file", f"longer than {limit:,}", "of all", "shortened", "turns dropped"]
    columns += ["tokens dropped", "left out"]
    lines = []
    for row in rows:
        left_out = sum(
            n
            for (bucket, reason), n in row.outcomes.items()
            if reason == "too_long" and bucket != "turns_dropped"
        )
        lines.append(
            [
                row.name,
                _n(row.too_long),
                _percent(row.too_long, len(row.lengths)),
                _n(row.count("turns_dropped")),
                _n(row.dropped_turns),
                _n(row.dropped_tokens),
                _n(left_out),
            ]
        )
    return FigureTable("Records longer than max_length", columns, lines)


def _lookalikes(rows: Sequence[SourceStatistics]) -> FigureTable:
    columns = ["file", f"{IMAGE_PLACEHOLDER} in answers", f"{IMAGE_PLACEHOLDER} elsewhere"]
    columns += ["control strings", "in records", FREE_TEXT]
    lines = [
        [
            row.name,
            _n(row.placeholders_in_answers),
            _n(row.placeholders_elsewhere),
            _n(row.control_strings.total()),
            _n(row.records_with_control),
            _most_common(row.control_strings),
        ]
        for row in rows
    ]
    note = "Spelled in the data and encoded as ordinary text, never as images or control tokens."
    return FigureTable("Text that looks like control", columns, lines, note)


def _most_common(found: Counter[str]) -> str:
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{text} {count:,}" for text, count in ordered[:MOST_NAMED]]
    more = len(ordered) - MOST_NAMED
    return ", ".join(named + ([f"{more} more"] if more > 0 else []))


def lengths_png(total: SourceStatistics, max_length: int) -> bytes:
    """Histogram of tokens a record, without and with image tokens, and the limit, as a PNG."""
    figure, axes = _figure()
    if total.lengths:
        _plot_lengths(axes, total)
        longest = max(total.lengths)
        if max_length != NO_LIMIT and max_length <= 4 * longest:
            axes.axvline(max_length, color="#b3261e", ls="--", lw=1.6, label="max_length")
        elif max_length != NO_LIMIT:
            note = f"max_length {max_length:,} lies far to the right"
            axes.text(0.98, 0.6, note, transform=axes.transAxes, ha="right", color="#b3261e")
        axes.legend(framealpha=0.9, edgecolor="none")
    axes.set(title="Tokens a record", xlabel="tokens", ylabel="records")
    return _png(figure)


def _plot_lengths(axes: Any, total: SourceStatistics) -> None:
    longest, shortest = max(total.lengths), min(total.text_lengths)
    bins = np.linspace(shortest, longest + 1, num=min(60, longest - shortest + 1) + 1)
    axes.hist(total.text_lengths, bins=bins, color="#9db8e8", label="without image tokens")
    style = {"histtype": "step", "color": "#123a7a", "lw": 1.8}
    axes.hist(total.lengths, bins=bins, label="with image tokens", **style)


def shares_png(total: SourceStatistics) -> bytes:
    """Histogram of the supervised share of each trained record, as a PNG."""
    figure, axes = _figure()
    if total.shares:
        percent = 100 * np.asarray(total.shares)
        axes.hist(percent, bins=np.linspace(0, 100, 51), color="#8cc9a5")
        mean = 100 * total.trained_tokens / total.text_tokens
        axes.axvline(mean, color="#1a5e39", ls="--", lw=1.6, label=f"of all text {mean:.0f} %")
        axes.legend(framealpha=0.9, edgecolor="none")
    axes.set(title="Trained tokens of a record's text", xlabel="%", ylabel="records", xlim=(0, 100))
    return _png(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.3), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _text_length(rendering: Rendering) -> int:
    return len(rendering.input_ids) - rendering.input_ids.count(IMAGE_TOKEN_ID)


def spread(lengths: Sequence[int]) -> dict[str, int]:
    """Shortest, median, 95th percentile and longest; each is the length of some record."""
    if not len(lengths):
        return {}
    ordered = np.sort(np.asarray(lengths))
    places = np.percentile(ordered, [0, 50, 95, 100], method="inverted_cdf")
    return dict(zip(("shortest", "median", "p95", "longest"), map(int, places), strict=True))


def _n(number: int) -> str:
    return f"{number:,}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
