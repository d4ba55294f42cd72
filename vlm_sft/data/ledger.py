"""What became of every input record: each ends in one bucket, and the buckets add up."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlm_sft.atomic import atomic_open
from vlm_sft.errors import RecordError

Bucket = Literal["trained", "turns_dropped", "skipped", "quarantined"]

_WORDS: dict[Bucket, str] = {
    "trained": "trained on whole",
    "turns_dropped": "trained on with turns dropped",
    "skipped": "skipped",
    "quarantined": "quarantined",
}


@dataclass(frozen=True, slots=True)
class Entry:
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
    """The entries of one data set in reading order."""

    entries: list[Entry] = field(default_factory=list)

    def add(
        self, record_id: str, where: str, bucket: Bucket, reason: str = "", message: str = ""
    ) -> None:
        """Note one record's end."""
        self.entries.append(Entry(record_id, where, bucket, reason, message))

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
        """Records by bucket and reason, for those not trained on whole."""
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
        """One line, e.g. `10 records: 8 trained on whole, 2 quarantined (empty_answer 2)`."""
        parts = []
        for bucket, count in self.counts.items():
            if count or bucket == "trained":
                reasons = [f"{r} {n}" for (b, r), n in self.reasons.items() if b == bucket and r]
                detail = f" ({', '.join(sorted(reasons))})" if reasons else ""
                parts.append(f"{count:,} {_WORDS[bucket]}{detail}")
        return f"{len(self.entries):,} records: {', '.join(parts)}"

    def write(self, path: str | Path) -> None:
        """Write `ledger.jsonl`: a line with the counts, then one line a record. Atomic."""
        head: dict[str, int] = {"total": len(self.entries)}
        head |= {str(bucket): count for bucket, count in self.counts.items()}
        with atomic_open(path) as file:
            file.write(json.dumps(head).encode() + b"\n")
            for entry in self.entries:
                line = {"id": entry.record_id, "where": entry.where, "bucket": entry.bucket}
                if entry.reason:
                    line |= {"reason": entry.reason, "message": entry.message}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
