"""One sample with everything that is known of it, found by its id."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from heapq import nlargest
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from data_tools.coco import AnnotatedImage
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.export import RECEIPTS
from data_tools.instruct.generate.answers import answers_folder, read_answers
from data_tools.instruct.index import read_images
from data_tools.instruct.lines import read_lines
from data_tools.instruct.plan.command import read_requests, read_templates
from data_tools.instruct.plan.prompts import messages
from data_tools.instruct.report.evidence import labels
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Answer, Failure, Request, Sample
from vlm_sft.errors import UserError

NEAREST: Final = 5


@dataclass(frozen=True)
class Stage:
    """How a request fared at one stage; `done` is None where the stage has not come to it."""

    name: str
    done: bool | None
    words: str


@dataclass(frozen=True)
class Explanation:
    """One sample completely.

    Attributes:
        image: None where the index has none of the request's id.
        messages: What was sent, in order; the last one is about this image.
        answer: As it came; None where there is none.
        sample: As verified; None where that has not been done.
        kept: As cleaning left it; None where it did not keep it, or has not been run.
        left_out: What cleaning took out: the sample, or turns of it.
    """

    request: Request
    image: AnnotatedImage | None
    image_dir: Path
    messages: tuple[Mapping[str, str], ...]
    answer: Answer | None
    sample: Sample | None
    kept: Sample | None
    left_out: tuple[Sample, ...]
    stages: tuple[Stage, ...]

    @property
    def names(self) -> dict[int, str]:
        """What each annotation was called before the teacher."""
        return labels(self.image, self.request.shown)

    @property
    def captions(self) -> dict[str, str]:
        """The captions that were shown, by their label."""
        if self.image is None:
            return {}
        texts = dict(zip(self.image.caption_ids, self.image.captions, strict=False))
        return {
            f"c{i}": texts.get(number, f"(annotation {number} is not in the index)")
            for i, number in enumerate(self.request.shown.captions, 1)
        }


def explain(config: InstructConfig, wanted: str) -> Explanation:
    """Everything about the sample of that id.

    Args:
        config: The run's.
        wanted: The sample's id, or its request's.

    Raises:
        UserError: Nothing is planned, or there is no such id; the nearest are named.
    """
    folder = RunFolder(Path(config.output_dir))
    request = _find(folder, wanted)
    samples = {
        name: _of_request(path, request.id)
        for name, path in (
            ("samples", folder.samples),
            ("rejected", folder.rejected),
            ("kept", folder.kept),
            ("set_aside", folder.set_aside),
        )
    }
    sample = next(iter(samples["samples"] + samples["rejected"]), None)
    kept = next(iter(samples["kept"]), None)
    answer = read_answers(answers_folder(config)).get(request.id)
    left_out = tuple(samples["set_aside"])
    return Explanation(
        request=request,
        image=read_images(folder).get(request.image),
        image_dir=Path(config.coco.images),
        messages=tuple(messages(request, read_templates(folder))),
        answer=answer,
        sample=sample,
        kept=kept,
        left_out=left_out,
        stages=tuple(_stages(folder, request, answer, sample, kept, left_out)),
    )


def _find(folder: RunFolder, wanted: str) -> Request:
    bare = wanted.split("-turn-")[0]
    for request in read_requests(folder):
        if bare == request.sample_id or wanted == request.id:
            return request
    ids = (request.sample_id for request in read_requests(folder))
    nearest = ", ".join(nlargest(NEAREST, ids, key=lambda found: _likeness(found, bare)))
    raise UserError(
        f"{folder.requests}: no request has the id {wanted!r}; "
        + (f"the nearest are {nearest}" if nearest else "the plan is empty")
    )


def _likeness(found: str, wanted: str) -> tuple[bool, float, str]:
    """Samples of the same image are nearer than others."""
    same = found.split("-")[0] == wanted.split("-")[0]
    return same, SequenceMatcher(None, found, wanted, autojunk=False).ratio(), found


def _of_request(path: Path, request: str) -> list[Sample]:
    """The file's samples that came of the request; lines that do not hold its id are not parsed."""
    if not path.exists():
        return []
    needle = request.encode()
    with path.open("rb") as file:
        return [
            _sample(line, path, number) for number, line in enumerate(file, 1) if needle in line
        ]


def _sample(line: bytes, path: Path, number: int) -> Sample:
    try:
        return Sample.model_validate_json(line)
    except ValidationError:
        raise UserError(
            f"{path}:{number}: is no sample; the file was damaged, run its stage again",
            code="json_syntax",
        ) from None


def _stages(
    folder: RunFolder,
    request: Request,
    answer: Answer | None,
    sample: Sample | None,
    kept: Sample | None,
    left_out: tuple[Sample, ...],
) -> Iterator[Stage]:
    yield Stage("planned", True, f"request {request.id}")
    if answer is None:
        yield _unanswered(folder, request)
        return
    cost = f"{answer.tokens_in:,} + {answer.tokens_out:,} tokens"
    yield Stage("answered", True, f"by {answer.teacher} {answer.model}, {cost}")
    if sample is None:
        yield Stage("verified", None, "not verified yet")
        return
    reasons = ", ".join(sample.reasons)
    if sample.status == "rejected":
        read = "" if sample.turns else "could not be read: "
        yield Stage("verified", False, f"rejected: {read}{reasons}")
        return
    yield Stage("verified", True, f"accepted, {len(sample.checks):,} checks")
    yield _cleaned(folder, kept, left_out)
    if kept is not None:
        yield _exported(folder, kept.id)


def _unanswered(folder: RunFolder, request: Request) -> Stage:
    """Why there is no answer; the last failure written is the truth."""
    lines = read_lines(folder.failures, Failure) if folder.failures.exists() else ()
    last = None
    for failure in lines:
        if failure.request == request.id:
            last = failure
    if last is None:
        return Stage("answered", None, "not asked yet")
    return Stage("answered", False, f"{last.reason}: {last.message}")


def _cleaned(folder: RunFolder, kept: Sample | None, left_out: tuple[Sample, ...]) -> Stage:
    reasons = ", ".join(f"{lost.id}: {', '.join(lost.reasons)}" for lost in left_out)
    if kept is not None:
        lost = f"; {len(left_out)} turns set aside ({reasons})" if left_out else ""
        return Stage("cleaned", True, f"kept{lost}")
    if left_out:
        return Stage("cleaned", False, f"set aside: {reasons}")
    done = folder.kept.exists()
    words = "in neither of clean's files: run `clean` again" if done else "not cleaned yet"
    return Stage("cleaned", None, words)


def _exported(folder: RunFolder, sample_id: str) -> Stage:
    path = folder.exports / RECEIPTS
    if not path.exists():
        return Stage("exported", None, "not exported yet")
    needle = json.dumps(sample_id).encode()
    with path.open("rb") as file:
        found = any(needle in line for line in file)
    if not found:
        return Stage("exported", False, "not among the exported samples; see export.json")
    names = sorted(p.name for p in folder.exports.iterdir() if p.name != RECEIPTS)
    return Stage("exported", True, f"in {', '.join(n for n in names if n != 'export.json')}")


def parameters(request: Request) -> str:
    """The sampling parameters in a line."""
    known: dict[str, Any] = request.parameters
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in known.items())


def model(found: Explanation) -> str:
    """Who answered, through what; before the answer, who is to be asked."""
    if found.answer is None:
        return str(found.request.parameters.get("model", ""))
    origin = f" ({found.sample.origin})" if found.sample else ""
    print_ = f", fingerprint {found.answer.fingerprint}" if found.answer.fingerprint else ""
    return f"{found.answer.model}{origin} through {found.answer.teacher}{print_}"


def cost(found: Explanation) -> str:
    """What the answer took, in words."""
    answer = found.answer
    if answer is None:
        return "nothing yet"
    price = "no price given" if answer.usd is None else f"${answer.usd:.6f}"
    cached = f" ({answer.tokens_cached:,} cached)" if answer.tokens_cached else ""
    return (
        f"{answer.tokens_in:,} tokens in{cached}, {answer.tokens_out:,} out, {price}; "
        f"sent {answer.attempts} time{'' if answer.attempts == 1 else 's'}, "
        f"finish {answer.finish or 'not told'}"
    )
