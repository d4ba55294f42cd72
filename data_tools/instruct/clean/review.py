"""Apply the decisions of reviewers before anything is cleaned: `reviewed.jsonl`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from data_tools.coco import AnnotatedImage
from data_tools.instruct.clean.codes import KEPT, REVIEW_EDIT, REVIEW_REJECTED
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.index import read_categories
from data_tools.instruct.lines import read_lines
from data_tools.instruct.plan.command import read_requests
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Check, Sample
from data_tools.instruct.verify import Policy
from data_tools.review.decisions import Decision, Verdicts, read_decisions
from data_tools.review.sources import reverified, sample_content
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import owned_open

RULE: Final = "review"
"""The rule of the checks that say what a reviewer has decided."""


def apply_decisions(
    config: InstructConfig, folder: RunFolder, images: Mapping[int, AnnotatedImage]
) -> tuple[Path, list[str], Verdicts | None]:
    """Return the file of samples to clean, and what reviewers have decided about each of them.

    Without `clean.decisions` that is `samples.jsonl`. With them it is `reviewed.jsonl`: the
    accepted samples, edited ones with their new text and checks, and those of `rejected.jsonl` that
    a reviewer has accepted or edited, in the order of the requests.

    Returns:
        The file; for each of its samples the code for which it is dropped, or `KEPT`; and the
        decisions with their counts.

    Raises:
        UserError: The folder has no decisions.
    """
    if config.clean.decisions is None:
        if any(folder.review.glob("*.jsonl")):
            echo(
                f"note: the decisions in {folder.review} are not read; "
                f"clean.decisions={folder.review} applies them"
            )
        return folder.samples, [], None
    verdicts = Verdicts(read_decisions(config.clean.decisions))
    policy = Policy(config.verify, read_categories(folder))
    codes: list[str] = []
    with owned_open(folder.reviewed) as file:
        for sample in _verified(folder):
            decision = verdicts.of(sample.id, lambda one=sample: sample_content(one))  # type: ignore[misc]
            if sample.status == "rejected" and (
                decision is None or decision.decision == "reject" or not sample.turns
            ):
                continue
            if decision is not None:
                sample = _decided(sample, decision, images, policy)
            code = KEPT
            if decision is not None and decision.decision == "reject":
                code = REVIEW_REJECTED
            elif decision is not None and sample.reasons:
                code = REVIEW_EDIT
            codes.append(code)
            file.write(sample.model_dump_json().encode() + b"\n")
    return folder.reviewed, codes, verdicts


def _verified(folder: RunFolder) -> Iterator[Sample]:
    """Yield accepted and rejected samples, in the order of the requests."""
    files = [read_lines(path, Sample) for path in (folder.samples, folder.rejected)]
    heads = [next(file, None) for file in files]
    for request in read_requests(folder):
        for place, head in enumerate(heads):
            if head is not None and head.request == request.id:
                yield head
                heads[place] = next(files[place], None)
    for place, head in enumerate(heads):  # of another plan, which later stages refuse
        if head is not None:
            yield head
            yield from files[place]


def _decided(
    sample: Sample,
    decision: Decision,
    images: Mapping[int, AnnotatedImage],
    policy: Policy,
) -> Sample:
    """Return a sample after a decision, with a check that says so.

    An accepted sample keeps the checks for which it was rejected, without their codes. An edited
    one is verified again; its reasons are those of the new text.
    """
    note = Check(rule=RULE, verdict="unknown", claim=decision.words)
    if decision.decision == "edit" and decision.turns is not None:
        sample = reverified(sample, decision.turns, images.get(sample.image.id), policy)
        return sample.model_copy(update={"checks": (*sample.checks, note)})
    checks = sample.checks
    if decision.decision == "accept" and sample.reasons:
        codes = ", ".join(sample.reasons)
        note = replace(note, claim=f"{decision.words}, against {codes}")
        checks = tuple(replace(check, code=None) for check in checks)
    return sample.model_copy(
        update={"checks": (*checks, note), "status": "accepted", "reasons": ()}
    )
