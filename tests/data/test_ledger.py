import json
from pathlib import Path

import pytest

from vlm_sft.data.ledger import Ledger
from vlm_sft.errors import RecordError


def filled() -> Ledger:
    ledger = Ledger()
    ledger.add("a", "f:1", "trained")
    ledger.add("b", "f:2", "turns_dropped", "too_long", "2 of 4 turns dropped")
    ledger.add("c", "f:3", "skipped", "too_long", "takes 9 tokens, `max_length` is 8")
    ledger.quarantine(RecordError("image_missing", "no image", record_id="ü", where="f:4"))
    ledger.quarantine(RecordError("empty_answer", "empty", record_id="e", where="f:5"))
    return ledger


def test_every_record_is_in_one_bucket_and_the_buckets_add_up():
    ledger = filled()
    assert ledger.counts == {"trained": 1, "turns_dropped": 1, "skipped": 1, "quarantined": 2}
    ledger.add_up(5)
    with pytest.raises(RuntimeError, match="5 entries for 6 input records"):
        ledger.add_up(6)


def test_the_summary_is_one_line_with_counts_by_bucket_and_reason():
    assert filled().summary() == (
        "5 records: 1 used whole, 1 used with turns dropped (too_long 1), "
        "1 skipped (too_long 1), 2 quarantined (empty_answer 1, image_missing 1)"
    )
    assert Ledger().summary() == "0 records: 0 used whole"


def test_the_file_begins_with_the_counts_and_has_a_line_for_every_record(tmp_path):
    filled().write(tmp_path / "run" / "ledger.jsonl")
    head, *lines = map(json.loads, (tmp_path / "run" / "ledger.jsonl").read_text().splitlines())
    assert head == {"total": 5, "trained": 1, "turns_dropped": 1, "skipped": 1, "quarantined": 2}
    assert lines[0] == {"id": "a", "where": "f:1", "bucket": "trained"}
    assert lines[3] == {
        "id": "ü",
        "where": "f:4",
        "bucket": "quarantined",
        "reason": "image_missing",
        "message": "f:4: record 'ü': no image",
    }
    assert len(lines) == 5


def test_held_out_records_are_evaluated_and_not_trained(tmp_path: Path) -> None:
    ledger = Ledger(held_out=True)
    ledger.add("a", "f:1", "trained")
    assert ledger.summary() == "1 record, all used"
    ledger.write(tmp_path / "ledger_eval.jsonl")
    head, row = map(json.loads, (tmp_path / "ledger_eval.jsonl").read_text().splitlines())
    assert head == {"total": 1, "evaluated": 1, "turns_dropped": 0, "skipped": 0, "quarantined": 0}
    assert row["bucket"] == "evaluated"
