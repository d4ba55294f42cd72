"""Every request of a run with what became of it, in one pass over the run's files."""

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

Outcome = Literal["unanswered", "unverified", "rejected", "accepted", "set_aside", "kept"]
"""Where a request stands: `unverified` has an answer, `accepted` has not been cleaned yet."""

OUTCOMES: Final[dict[Outcome, str]] = {
    "unanswered": "not answered yet",
    "unverified": "answered, not verified yet",
    "rejected": "rejected",
    "accepted": "accepted, not cleaned yet",
    "set_aside": "accepted, then set aside",
    "kept": "kept",
}
"""Outcomes in words."""


@dataclass(frozen=True)
class Journey:
    """A request and its end.

    Attributes:
        answer: Only where the request is `unverified`; a sample carries what counts of it.
        sample: Where there is one, as it was verified.
        kept: Where it is `kept`, as it is trained on: perhaps with fewer turns.
        left_out: What cleaning took out: the sample, or single turns of it.
        reasons: Codes that rejected the sample or set it aside as a whole; why it is unanswered,
            where the teacher was asked.
    """

    request: Request
    outcome: Outcome
    answer: Answer | None = None
    sample: Sample | None = None
    kept: Sample | None = None
    left_out: tuple[Sample, ...] = ()
    reasons: tuple[str, ...] = ()


def journeys(folder: RunFolder, answers_folder: Path) -> Iterator[Journey]:
    """The run's requests in their order; stages that have not been run are no error.

    Memory stays flat: the files are in one order and are read side by side.

    Args:
        folder: The run's.
        answers_folder: Where its answers lie, which runs may share.

    Raises:
        UserError: Nothing is planned, or a file belongs to another plan than the one there.
    """
    answers: Mapping[str, Answer] = read_answers(answers_folder)
    accepted, rejected = _Beside(folder.samples, "verify"), _Beside(folder.rejected, "verify")
    kept, set_aside = _Beside(folder.kept, "clean"), _Beside(folder.set_aside, "clean")
    failures = _failures(folder)
    for request in read_requests(folder):
        if (sample := accepted.take(request)) is not None:
            yield _cleaned(request, sample, kept, set_aside)
        elif (sample := rejected.take(request)) is not None:
            yield Journey(request, "rejected", sample=sample, reasons=sample.reasons)
        elif (answer := answers.get(request.id)) is not None:
            yield Journey(request, "unverified", answer=answer)
        else:
            why = failures.get(request.id)
            yield Journey(request, "unanswered", reasons=(why,) if why else ())
    for file in (accepted, rejected, kept, set_aside):
        file.require_read()


def _failures(folder: RunFolder) -> dict[str, str]:
    """Why requests have no answer, by their id."""
    if not folder.failures.exists():
        return {}
    return {found.request: found.reason for found in read_lines(folder.failures, Failure)}


def _cleaned(request: Request, sample: Sample, kept: "_Beside", set_aside: "_Beside") -> Journey:
    whole = kept.take(request)
    left_out = tuple(iter(lambda: set_aside.take(request), None))
    if whole is not None:
        return Journey(request, "kept", sample=sample, kept=whole, left_out=left_out)
    if left_out:
        reasons = tuple(dict.fromkeys(code for lost in left_out for code in lost.reasons))
        return Journey(request, "set_aside", sample=sample, left_out=left_out, reasons=reasons)
    return Journey(request, "accepted", sample=sample)


class _Beside:
    """A file of samples that follows the order of the requests; it may be absent."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage
        self._lines = read_lines(path, Sample) if path.exists() else iter(())
        self._next = next(self._lines, None)

    def take(self, request: Request) -> Sample | None:
        """The next sample if it, or a turn of it, came of this request."""
        sample = self._next
        if sample is None or sample.request != request.id:
            return None
        self._next = next(self._lines, None)
        return sample

    def require_read(self) -> None:
        """Refuse a file of which something is left: it is not of these requests."""
        if self._next is not None:
            raise UserError(
                f"{self.path}: sample {self._next.id!r} belongs to no request of the present plan, "
                f"or stands out of its order; run `{self.stage}` again, and what follows it"
            )
