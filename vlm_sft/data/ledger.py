"""The ledger: the status of every input record, each in exactly one bucket."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlm_sft.errors import RecordError
from vlm_sft.utils.atomic_files import atomic_open

Bucket = Literal["trained", "turns_dropped", "skipped", "quarantined"]

_DESCRIPTIONS: dict[Bucket, str] = {
    "trained": "used whole",
    "turns_dropped": "used with turns dropped",
    "skipped": "skipped",
    "quarantined": "quarantined",
}


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """The status of one record.

    Attributes:
        record_id: The record's id.
        where: `file:line` or `file[index]`.
        bucket: `trained`, `turns_dropped` (trained on with fewer turns), `skipped` (by a policy)
            or `quarantined` (unusable).
        reason: A name of `errors.codes`; empty for `trained`.
        message: A sentence for the user; empty for `trained`.
    """

    record_id: str
    where: str
    bucket: Bucket
    reason: str = ""
    message: str = ""


@dataclass
class Ledger:
    """The entries of one data set, in reading order.

    Args:
        entries: Entries so far.
        held_out: The records are evaluated and never trained on; the file calls them `evaluated`.
    """

    entries: list[LedgerEntry] = field(default_factory=list)
    held_out: bool = False

    def add(
        self, record_id: str, where: str, bucket: Bucket, reason: str = "", message: str = ""
    ) -> None:
        """Add an entry."""
        self.entries.append(LedgerEntry(record_id, where, bucket, reason, message))

    def quarantine(self, error: RecordError) -> None:
        """Add the entry of an unusable record."""
        self.add(error.record_id, error.where, "quarantined", error.reason, str(error))

    @property
    def counts(self) -> dict[Bucket, int]:
        """Number of records per bucket, for all buckets."""
        found = Counter(entry.bucket for entry in self.entries)
        return {bucket: found[bucket] for bucket in _DESCRIPTIONS}

    @property
    def reasons(self) -> dict[tuple[Bucket, str], int]:
        """Number of records per bucket and reason, for those not in `trained`."""
        return dict(Counter((e.bucket, e.reason) for e in self.entries if e.bucket != "trained"))

    def add_up(self, total: int) -> None:
        """Check that `total` input records have one entry each.

        Raises:
            RuntimeError: They have not, which is a bug of this program.
        """
        if len(self.entries) != total:
            raise RuntimeError(
                f"the ledger has {len(self.entries)} entries for {total} input records; "
                "this is a bug: please report it with the ledger"
            )

    def summary(self) -> str:
        """Return a line, e.g. `10 records: 8 used whole, 2 quarantined (empty_answer 2)`."""
        parts = []
        if self.entries and self.counts["trained"] == len(self.entries):
            return f"{_records(len(self.entries))}, all used"
        for bucket, count in self.counts.items():
            if count or bucket == "trained":
                reasons = [f"{r} {n}" for (b, r), n in self.reasons.items() if b == bucket and r]
                detail = f" ({', '.join(sorted(reasons))})" if reasons else ""
                parts.append(f"{count:,} {_DESCRIPTIONS[bucket]}{detail}")
        return f"{_records(len(self.entries))}: {', '.join(parts)}"

    def write(self, path: str | Path) -> None:
        """Write `ledger.jsonl` atomically: a line with the counts, then one line per record."""
        names = {bucket: self._name(bucket) for bucket in _DESCRIPTIONS}
        head: dict[str, int] = {"total": len(self.entries)}
        head |= {names[bucket]: count for bucket, count in self.counts.items()}
        with atomic_open(path) as file:
            file.write(json.dumps(head).encode() + b"\n")
            for entry in self.entries:
                line = {"id": entry.record_id, "where": entry.where, "bucket": names[entry.bucket]}
                if entry.reason:
                    line |= {"reason": entry.reason, "message": entry.message}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def _name(self, bucket: Bucket) -> str:
        """Return a bucket's name in the file."""
        return "evaluated" if self.held_out and bucket == "trained" else bucket


def _records(count: int) -> str:
    return f"{count:,} record{'' if count == 1 else 's'}"
