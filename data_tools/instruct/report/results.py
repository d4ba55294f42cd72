"""Read every request of a run with its result, in one pass over the run's files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from data_tools.instruct.generate.answers import read_answers
from data_tools.instruct.lines import read_lines
from data_tools.instruct.plan.command import read_requests
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Answer, Failure, Request, Sample
from vlm_sft.errors import UserError

Outcome = Literal["unanswered", "unverified", "rejected", "accepted", "dropped", "kept"]

OUTCOMES: Final[dict[Outcome, str]] = {
    "unanswered": "not answered",
    "unverified": "answered, not verified yet",
    "rejected": "all answers rejected by verify",
    "dropped": "all samples dropped by clean",
    "accepted": "accepted, not cleaned yet",
    "kept": "in the training files",
}
"""Outcomes in words, the furthest last."""


@dataclass(frozen=True)
class Result:
    """A request and its outcome.

    Attributes:
        answer: Only if the outcome is `unverified`; a sample has the cost of its answer.
        sample: The sample as it was verified, if there is one.
        kept: The sample as cleaning kept it, possibly with fewer turns.
        dropped: What cleaning dropped: the whole sample, or single turns of it.
        reasons: Codes for which the sample was rejected or dropped as a whole. For an unanswered
            request, the reason of its last failure, if it was sent.
    """

    request: Request
    outcome: Outcome
    answer: Answer | None = None
    sample: Sample | None = None
    kept: Sample | None = None
    dropped: tuple[Sample, ...] = ()
    reasons: tuple[str, ...] = ()


def read_results(folder: RunFolder, answers_folder: Path) -> Iterator[Result]:
    """Yield the results of the run's requests in the order of the plan.

    Files of stages that have not run may be missing. All files are in the plan's order and are read
    in parallel, so memory does not grow with the number of samples.

    Args:
        folder: The run directory.
        answers_folder: Directory of its answers, which several runs may share.

    Raises:
        UserError: There is no plan, or a file belongs to another plan.
    """
    answers: Mapping[str, Answer] = read_answers(answers_folder)
    failures: dict[str, str] = {}
    if folder.failures.exists():
        failures = {line.request: line.reason for line in read_lines(folder.failures, Failure)}
    accepted, rejected = _Samples(folder.samples, "verify"), _Samples(folder.rejected, "verify")
    kept, dropped = _Samples(folder.kept, "clean"), _Samples(folder.dropped, "clean")
    for request in read_requests(folder):
        if (sample := accepted.take(request)) is not None:
            yield _cleaned(request, sample, kept, dropped)
        elif (sample := rejected.take(request)) is not None:
            found = _cleaned(request, sample, kept, dropped)  # a reviewer may have taken it
            if found.outcome == "accepted":
                found = Result(request, "rejected", sample=sample, reasons=sample.reasons)
            yield found
        elif (answer := answers.get(request.id)) is not None:
            yield Result(request, "unverified", answer=answer)
        else:
            reason = failures.get(request.id)
            yield Result(request, "unanswered", reasons=(reason,) if reason else ())
    for file in (accepted, rejected, kept, dropped):
        file.require_read()


def _cleaned(request: Request, sample: Sample, kept: "_Samples", dropped: "_Samples") -> Result:
    whole = kept.take(request)
    lost = tuple(iter(lambda: dropped.take(request), None))
    if whole is not None:
        return Result(request, "kept", sample=sample, kept=whole, dropped=lost)
    if lost:
        reasons = tuple(dict.fromkeys(code for part in lost for code in part.reasons))
        return Result(request, "dropped", sample=sample, dropped=lost, reasons=reasons)
    return Result(request, "accepted", sample=sample)


class _Samples:
    """A file of samples in the order of the requests; it may be missing."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage
        self._lines = read_lines(path, Sample) if path.exists() else iter(())
        self._next = next(self._lines, None)

    def take(self, request: Request) -> Sample | None:
        """Return the next sample if it, or a turn of it, is from this request."""
        sample = self._next
        if sample is None or sample.request != request.id:
            return None
        self._next = next(self._lines, None)
        return sample

    def require_read(self) -> None:
        """Refuse a file with unread samples: they are from other requests."""
        if self._next is not None:
            raise UserError(
                f"{self.path}: sample {self._next.id!r} belongs to no request of the present plan, "
                f"or is out of order; run `{self.stage}` again, and the stages after it"
            )
