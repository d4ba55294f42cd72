"""What became of the images and requests of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.instruct.outcomes import Row, outcomes
from data_tools.instruct.plan.command import read_requests
from data_tools.instruct.run_folder import RunFolder
from tests.data_tools.asked import planned
from vlm_sft.errors import UserError


def write(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def run_folder(tmp_path: Path) -> RunFolder:
    """Three requests each about images 1 to 4, of which none has an answer; 6 images annotated."""
    _, folder = planned(tmp_path, images=4)
    missing = {"count": 1, "meaning": "images without a file", "examples": ["a"]}
    index = {"images": {"annotated": 6}, "findings": {"image_missing": missing}}
    write(folder.index, index)
    names = ("of_evaluations", "without_annotations", "not_chosen", "chosen_without_a_type")
    lists = {"val2017": {"overlap": 1}, "pope": {"overlap": 0}}
    left_out = {**dict.fromkeys(names, 0), "of_evaluations": 1}
    write(folder.plan, {"left_out": left_out, "guard": {"lists": lists}})
    for path in (folder.kept, folder.dropped, folder.rejected):
        write(path)
    return folder


def test_an_image_counts_where_its_request_that_got_furthest_ended(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    requests = list(read_requests(folder))

    def sample(number: int, *reasons: str) -> dict[str, Any]:
        of = requests[number]
        image = {"id": of.image, "width": 9}
        return {"id": of.sample_id, "image": image, "request": of.id, "reasons": reasons}

    turn = sample(0, "ANSWER_BALANCE")
    write(folder.kept, sample(0))
    write(folder.dropped, {**turn, "id": f"{turn['id']}-turn-1"}, sample(1, "NEAR_DUPLICATE"))
    write(folder.rejected, sample(2, "LEAK"), sample(3, "LEAK", "REFUSAL"))
    failed = [(4, "timeout"), (6, "timeout"), (7, "nothing_to_say"), (3, "timeout")]
    lines = [{"request": requests[n].id, "reason": reason, "message": "x"} for n, reason in failed]
    write(folder.failures, *lines)
    assert outcomes(folder).rows() == [
        Row("in the training files", 1, 1, ""),
        Row("all samples dropped by clean", 0, 1, "NEAR_DUPLICATE 1 (dropped.jsonl)"),
        Row("all answers rejected by verify", 1, 2, "LEAK 2, REFUSAL 1 (rejected.jsonl)"),
        Row(
            "no answer",
            2,
            8,
            "not asked yet 5, failed: timeout 2, rules find nothing certain to say 1 "
            "(failures.jsonl)",
        ),
        Row(
            "evaluation images",
            1,
            0,
            "val2017 1; refused, guard.allow_evaluation_images=true keeps them",
        ),
        Row("images without a file", 1, 0, ""),
    ]


def test_a_stage_that_has_not_run_is_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    folder.kept.unlink()
    with pytest.raises(UserError, match=r"kept\.jsonl: no such file; run the stages up to `clean`"):
        outcomes(folder)
