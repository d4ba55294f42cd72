"""Runs of instruction data written file by file, with samples of every fate."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_tools.coco import AnnotatedImage
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.index import write_images
from data_tools.instruct.lines import write_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import (
    Answer,
    Check,
    Cost,
    ImageSource,
    Request,
    Sample,
    SampleType,
    Shown,
    Turn,
)

FATES = ("kept", "kept", "kept", "kept", "lost_turn", "duplicate", "count", "object", "unread",
         "unanswered")  # fmt: skip
"""What becomes of the requests, in turn."""


def config_of(root: Path, images: Path, **more: Any) -> InstructConfig:
    """A configuration whose run lies in `root`."""
    values: dict[str, Any] = {
        "output_dir": str(root),
        "coco": {"images": str(images), "captions": "captions.json"},
        "teacher": {"kind": "openai", "model": "scripted"},
    }
    return InstructConfig.model_validate(values | more)


@dataclass
class Run:
    """The lines of a run before they are written."""

    images: Sequence[AnnotatedImage]
    requests: list[Request] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    rejected: list[Sample] = field(default_factory=list)
    kept: list[Sample] = field(default_factory=list)
    dropped: list[Sample] = field(default_factory=list)
    numbers: Counter[tuple[int, str]] = field(default_factory=Counter)
    """Requests so far by image and type."""

    def write(self, root: Path, *stages: str) -> RunFolder:
        """Write what the stages named would have written; without names, what all would have."""
        folder = RunFolder(root)
        write_images(folder, self.images)
        files: dict[str, list[tuple[Path, Sequence[BaseModel]]]] = {
            "plan": [(folder.requests, self.requests)],
            "generate": [(folder.answers / "part-00001.jsonl", self.answers)],
            "verify": [(folder.samples, self.samples), (folder.rejected, self.rejected)],
            "clean": [(folder.kept, self.kept), (folder.dropped, self.dropped)],
        }
        for stage in stages or files:
            for path, lines in files.get(stage, ()):
                write_lines(path, lines)
        if "plan" in (stages or files):
            folder.templates.write_text(json.dumps(TEMPLATES))
        return folder


TEMPLATES: dict[str, Any] = {
    name: {
        "messages": [
            {"role": "system", "content": f"You write {name} data."},
            {"role": "user", "content": "A seed example."},
            {"role": "assistant", "content": '{"turns": []}'},
        ],
        "sha256": "0" * 64,
    }
    for name in ("conversation", "detail", "reasoning")
}


def make_run(images: Sequence[AnnotatedImage], per_image: Sequence[SampleType]) -> Run:
    """A run in which the fates take turns."""
    run = Run(images)
    fates = _forever(FATES)
    for image in images:
        for sample_type in per_image:
            add(run, image, sample_type, next(fates))
    return run


def _forever(values: Sequence[str]) -> Iterator[str]:
    while True:
        yield from values


def add(run: Run, image: AnnotatedImage, sample_type: SampleType, fate: str) -> None:
    """One request with all that came of it."""
    number = run.numbers[image.id, sample_type]
    run.numbers[image.id, sample_type] += 1
    request = request_about(image, sample_type, number)
    run.requests.append(request)
    if fate == "unanswered":
        return
    turns, checks = talk(image, sample_type, fate)
    text = json.dumps({"turns": [turn.model_dump() for turn in turns]})
    run.answers.append(
        Answer(
            request=request.id, teacher="openai", finish="stop", model="scripted-1", usd=0.0003,
            text="I am sorry, I cannot see the picture." if fate == "unread" else text,
            tokens_in=900, tokens_out=100, seconds=float(len(run.requests)),
        )
    )  # fmt: skip
    reasons = tuple(dict.fromkeys(check.code for check in checks if check.code))
    sample = sample_of(request, image, run.answers[-1], turns, checks, reasons)
    (run.rejected if reasons else run.samples).append(sample)
    if not reasons:
        _clean(run, sample, fate)


def _clean(run: Run, sample: Sample, fate: str) -> None:
    if fate == "duplicate":
        lost = Check(
            rule="clean", verdict="contradicted", code="NEAR_DUPLICATE", claim="duplicate of x"
        )
        run.dropped.append(_aside(sample, lost, sample.id))
    elif fate == "lost_turn" and len(sample.turns) > 1:
        lost = Check(rule="clean", verdict="contradicted", code="ANSWER_BALANCE", turn=0)
        one = sample.model_copy(update={"turns": sample.turns[-1:], "checks": ()})
        run.dropped.append(_aside(one, lost, f"{sample.id}-turn-{len(sample.turns) - 1}"))
        checks = tuple(c for c in sample.checks if c.turn != len(sample.turns) - 1)
        run.kept.append(sample.model_copy(update={"turns": sample.turns[:-1], "checks": checks}))
    else:
        run.kept.append(sample)


def _aside(sample: Sample, check: Check, sample_id: str) -> Sample:
    return sample.model_copy(
        update={
            "id": sample_id,
            "status": "rejected",
            "reasons": (check.code,),
            "checks": (*sample.checks, check),
        }
    )


def request_about(image: AnnotatedImage, sample_type: SampleType, number: int) -> Request:
    """A request that shows all captions and the first 30 boxes."""
    shown = Shown(
        captions=image.caption_ids,
        boxes=tuple(box.id for box in image.boxes[:30]),
        summarised={"far ones": tuple(box.id for box in image.boxes[30:])}
        if image.boxes[30:]
        else {},
    )
    lines = [f"c{i}: {text}" for i, text in enumerate(image.captions, 1)]
    lines += [f"b{i}: {box.category}" for i, box in enumerate(image.boxes[:30], 1)]
    return Request(
        id=hashlib.sha256(f"{image.id}-{sample_type}-{number}".encode()).hexdigest(),
        sample_id=f"{image.id:012d}-{sample_type}-{number}",
        image=image.id, type=sample_type, number=number, template=sample_type,
        template_sha256=hashlib.sha256(sample_type.encode()).hexdigest(),
        question="Describe the picture." if sample_type == "detail" else None,
        context="\n".join(lines), parameters={"model": "scripted", "temperature": 0.7},
        shown=shown,
    )  # fmt: skip


def talk(
    image: AnnotatedImage, sample_type: SampleType, fate: str
) -> tuple[tuple[Turn, ...], tuple[Check, ...]]:
    """Turns about the image's boxes, with the checks that a verifier would have made."""
    if fate == "unread":
        return (), (Check(rule="form", verdict="contradicted", code="REFUSAL", claim="I am sorry"),)
    if sample_type == "detail":
        return _description(image, fate)
    turns, checks = [], []
    for name in image.categories[:2] or ("image",):
        ids = tuple(box.id for box in image.of(name))
        said = len(ids) + (fate == "count")
        answer = f"There are {said} of {name} in view, as the photo shows."
        turn = len(turns)
        turns.append(Turn(question=f"How many of {name} can be seen?", answer=answer, kind="count"))
        wrong = fate == "count"
        checks.append(
            Check(
                rule="count", verdict="contradicted" if wrong else "supported",
                code="COUNT_WRONG" if wrong else None, turn=turn, part="answer",
                span=(10, answer.index(" in view")), claim=f"{said} {name}", evidence=ids,
            )
        )  # fmt: skip
    there = image.categories[0] if image.categories else "person"
    asked, said = ("unicorn", "No") if image.id % 2 else (there, "Yes")
    answer = f"{said}, {'there is no' if said == 'No' else 'I can see a'} {asked}."
    turns.append(Turn(question=f"Is there a {asked}?", answer=answer, kind="existence"))
    start = answer.index(asked)
    checks.append(
        Check(
            rule="object", verdict="unknown" if said == "No" else "supported", turn=len(turns) - 1,
            part="answer", span=(start, start + len(asked)), claim=asked,
            evidence=tuple(box.id for box in image.of(asked)),
        )
    )  # fmt: skip
    if fate == "object":
        checks += _invented(turns)
    return tuple(turns), tuple(checks)


def _invented(turns: list[Turn]) -> list[Check]:
    answer = "A giraffe stands behind it, which makes the scene peaceful."
    turns.append(Turn(question="What stands behind?", answer=answer, kind="place"))
    return [
        Check(
            rule="object", verdict="contradicted", code="OBJECT_NOT_FOUND", turn=len(turns) - 1,
            part="answer", span=(2, 9), claim="giraffe",
        )
    ]  # fmt: skip


def _description(image: AnnotatedImage, fate: str) -> tuple[tuple[Turn, ...], tuple[Check, ...]]:
    text, checks = "The picture shows ", []
    for name in image.categories or ("something",):
        start = len(text)
        text += name
        ids = tuple(box.id for box in image.of(name))
        verdict = "supported" if ids else "unknown"
        checks.append(
            Check(rule="object", verdict=verdict, turn=0, part="answer", span=(start, len(text)),
                  claim=name, evidence=ids or image.caption_ids[:1])
        )  # fmt: skip
        text += " and "
    text = text.removesuffix(" and ") + ". It was taken in daylight."
    if fate in ("count", "object"):
        start = len(text) + 3
        text += " A giraffe looks on."
        checks.append(
            Check(rule="object", verdict="contradicted", code="OBJECT_NOT_FOUND", turn=0,
                  part="answer", span=(start, start + 7), claim="giraffe")
        )  # fmt: skip
    turn = Turn(question="Describe the picture.", answer=text, kind="description")
    return (turn,), tuple(checks)


def sample_of(
    request: Request,
    image: AnnotatedImage,
    answer: Answer,
    turns: tuple[Turn, ...],
    checks: tuple[Check, ...],
    reasons: tuple[str, ...],
) -> Sample:
    """The verified sample."""
    return Sample(
        id=request.sample_id, type=request.type, origin="llm",
        image=ImageSource(
            id=image.id, file_name=image.file_name, width=image.width,
            height=image.height, license=image.license,
        ),
        turns=turns, raw=None if turns else answer.text, shown=request.shown, request=request.id,
        template=request.template, template_sha256=request.template_sha256, model=answer.model,
        parameters=request.parameters,
        cost=Cost(tokens_in=answer.tokens_in, tokens_out=answer.tokens_out, usd=answer.usd),
        tool="vlm_sft test", checks=checks, status="rejected" if reasons else "accepted",
        reasons=reasons,
    )  # fmt: skip
