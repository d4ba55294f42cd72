"""What became of every input record: each ends in one bucket, and the buckets add up."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlm_sft.errors import RecordError
from vlm_sft.utils.atomic_files import atomic_open

Bucket = Literal["trained", "turns_dropped", "skipped", "quarantined"]

_WORDS: dict[Bucket, str] = {
    "trained": "used whole",
    "turns_dropped": "used with turns dropped",
    "skipped": "skipped",
    "quarantined": "quarantined",
}


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One record's end.

    Attributes:
        record_id: The record's id.
        where: `file:line` or `file[index]`.
        bucket: `trained`, `turns_dropped` (trained on, shortened), `skipped` (by policy) or
            `quarantined` (faulty).
        reason: A name of `error_codes`, empty for `trained`.
        message: The sentence for people, empty for `trained`.
    """

    record_id: str
    where: str
    bucket: Bucket
    reason: str = ""
    message: str = ""


@dataclass
class Ledger:
    """The entries of one data set in reading order.

    Args:
        entries: What is known already.
        held_out: The records are evaluated and never trained on, which the file says.
    """

    entries: list[LedgerEntry] = field(default_factory=list)
    held_out: bool = False

    def add(
        self, record_id: str, where: str, bucket: Bucket, reason: str = "", message: str = ""
    ) -> None:
        """Note one record's end."""
        self.entries.append(LedgerEntry(record_id, where, bucket, reason, message))

    def quarantine(self, error: RecordError) -> None:
        """Note a record left out for its fault."""
        self.add(error.record_id, error.where, "quarantined", error.reason, str(error))

    @property
    def counts(self) -> dict[Bucket, int]:
        """Records by bucket; every bucket is there."""
        found = Counter(entry.bucket for entry in self.entries)
        return {bucket: found[bucket] for bucket in _WORDS}

    @property
    def reasons(self) -> dict[tuple[Bucket, str], int]:
        """Records by bucket and reason, for those not used whole."""
        return dict(Counter((e.bucket, e.reason) for e in self.entries if e.bucket != "trained"))

    def add_up(self, total: int) -> None:
        """Check that `total` input records have one entry each.

        Raises:
            RuntimeError: They have not, which is a fault of this program.
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
                parts.append(f"{count:,} {_WORDS[bucket]}{detail}")
        return f"{_records(len(self.entries))}: {', '.join(parts)}"

    def write(self, path: str | Path) -> None:
        """Write `ledger.jsonl`: a line with the counts, then one line a record. Atomic."""
        names = {bucket: self._name(bucket) for bucket in _WORDS}
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
        """Return a bucket's name in the file: held-out records are not `trained`."""
        return "evaluated" if self.held_out and bucket == "trained" else bucket


def _records(count: int) -> str:
    return f"{count:,} record{'' if count == 1 else 's'}"
