"""`explain`: show one sample completely, on the terminal, as a page, or as an image with boxes."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from heapq import nlargest
from pathlib import Path
from typing import Final

from pydantic import ValidationError
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from data_tools.coco import AnnotatedImage
from data_tools.instruct import contamination
from data_tools.instruct.clean.codes import REVIEW_REJECTED
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.export import RECEIPTS
from data_tools.instruct.generate.answers import answers_folder, read_answers
from data_tools.instruct.index import read_images
from data_tools.instruct.lines import read_lines
from data_tools.instruct.plan.command import LEFT_OUT, read_requests, read_templates
from data_tools.instruct.plan.prompts import messages
from data_tools.instruct.report.draw import SYMBOLS, draw_png, drawn_boxes, worst_verdict
from data_tools.instruct.report.samples import (
    annotation_labels,
    cited_labels,
    claim_spans,
    deciding_checks,
    open_image,
    split_at_claims,
    view_image,
    view_sample,
)
from data_tools.instruct.run_folder import RunFolder, run_inputs
from data_tools.instruct.schema import Answer, Check, Failure, Judgment, Request, Sample, Verdict
from data_tools.instruct.verify.agreement import WITHOUT_VERDICT
from vlm_sft.errors import UserError
from vlm_sft.utils.console import Console as SafeConsole
from vlm_sft.utils.console import echo
from vlm_sft.utils.escape import escape_control
from vlm_sft.utils.html import render_page
from vlm_sft.utils.output_files import write_result

NEAREST: Final = 5
"""Ids that are suggested for one that does not exist."""

_STYLES: Final[dict[Verdict, str]] = {
    "supported": "blue",
    "contradicted": "bold red",
    "unknown": "yellow",
}


def command(
    config: InstructConfig,
    id: str,
    *,
    png: Path | None = None,
    html: Path | None = None,
    prompt: bool = False,
    overwrite: bool = False,
) -> None:
    """Print a sample, or write it as an image or a page.

    Args:
        config: Configuration of the run.
        id: Id of the sample or of its request.
        png: File for the image with its boxes.
        html: File for the page.
        prompt: Whether to print the system text and the seed examples.
        overwrite: Whether files that this command did not write may be replaced.

    Raises:
        UserError: There is no such id (the nearest are named), or no image for `--png`.
    """
    found = explain(config, id)
    inputs = _inputs(config, found)
    if png:
        write_result(png, _png(found), inputs=inputs, overwrite=overwrite)
        echo(f"{png}: the image with its boxes", file=sys.stdout)
    if html:
        write_result(html, _page(found), inputs=inputs, overwrite=overwrite)
        echo(f"{html}: the sample as a page", file=sys.stdout)
    if not png and not html:
        show(SafeConsole(highlight=False), found, whole_prompt=prompt)


@dataclass(frozen=True)
class Stage:
    """What a stage did with the request; `done` is None if it has not come to it."""

    name: str
    done: bool | None
    words: str

    @property
    def symbol(self) -> str:
        """Check mark, cross, or dot."""
        return {True: "✓", False: "✗", None: "·"}[self.done]

    @property
    def css(self) -> str:
        """Class on a page."""
        return {True: "supported", False: "contradicted", None: ""}[self.done]


@dataclass(frozen=True)
class Explanation:
    """One sample completely.

    Attributes:
        image: None if the index does not have it.
        messages: The messages as sent; the last one is about this image.
        answer: The raw answer, if there is one.
        sample: The sample as verified, if it was.
        stages: What each stage did.
    """

    request: Request
    image: AnnotatedImage | None
    image_dir: Path
    messages: tuple[Mapping[str, str], ...]
    answer: Answer | None
    sample: Sample | None
    stages: tuple[Stage, ...]

    @property
    def labels(self) -> dict[int, str]:
        """Labels of the annotations in the prompt."""
        return annotation_labels(self.image, self.request.shown)

    @property
    def captions(self) -> dict[str, str]:
        """Captions in the prompt by label."""
        if self.image is None:
            return {}
        texts = dict(zip(self.image.caption_ids, self.image.captions, strict=False))
        return {
            f"c{i}": texts.get(number, f"(annotation {number} is not in the index)")
            for i, number in enumerate(self.request.shown.captions, 1)
        }

    @property
    def provenance(self) -> dict[str, str]:
        """Who answered, from what, and what it cost."""
        request = self.request
        parameters = (f"{name} {json.dumps(value)}" for name, value in request.parameters.items())
        return {
            "model": _model(self),
            "parameters": ", ".join(parameters),
            "cost": _cost(self.answer),
            "request": request.id,
            "template": f"{request.template} {request.template_sha256}",
            **_origin(request),
        }


def _origin(request: Request) -> dict[str, str]:
    """Return what a grown sample was made from."""
    if (grown := request.grown) is None:
        return {}
    found = {"grown by": grown.operator, "parents": ", ".join(grown.parents) or "the image alone"}
    if grown.images:
        found["more images"] = ", ".join(image.file_name for image in grown.images)
    if grown.language:
        found["language"] = grown.language
    if grown.constraints:
        found["constraints"] = "; ".join(one.kind for one in grown.constraints)
    if grown.tasks:
        found["questions"] = "; ".join(
            f"{task.question} ({task.why}, {'answerable' if task.answerable else 'unanswerable'})"
            for task in grown.tasks
        )
    return found


def explain(config: InstructConfig, wanted: str) -> Explanation:
    """Collect everything about a sample.

    Args:
        config: Configuration of the run.
        wanted: Id of the sample or of its request.

    Raises:
        UserError: Nothing is planned, or there is no such id; the nearest are named.
    """
    folder = RunFolder(Path(config.output_dir))
    request = _find(config, folder, wanted)
    verified = [
        sample
        for path in (folder.samples, folder.rejected)
        for sample in _samples_of(path, request.id)
    ]
    sample = next(iter(verified), None)
    answer = read_answers(answers_folder(config)).get(request.id)
    return Explanation(
        request=request,
        image=read_images(folder).get(request.image),
        image_dir=Path(config.coco.images),
        messages=tuple(messages(request, read_templates(folder))),
        answer=answer,
        sample=sample,
        stages=tuple(_stages(folder, request, answer, sample)),
    )


def _find(config: InstructConfig, folder: RunFolder, wanted: str) -> Request:
    bare = wanted.split("-turn-")[0]
    for request in read_requests(folder):
        if bare == request.sample_id or wanted == request.id:
            return request

    def similarity(sample_id: str) -> tuple[bool, float, str]:
        same_image = sample_id.split("-")[0] == bare.split("-")[0]
        ratio = SequenceMatcher(None, sample_id, bare, autojunk=False).ratio()
        return same_image, ratio, sample_id

    for image in read_images(folder).values():
        if wanted in (image.file_name, str(image.id), f"{image.id:012d}"):
            raise UserError(f"{image.file_name}: {_about_image(config, folder, image)}")
    ids = (request.sample_id for request in read_requests(folder))
    nearest = ", ".join(nlargest(NEAREST, ids, key=similarity))
    raise UserError(
        f"{folder.requests}: no request has the id {wanted!r}; "
        + (f"the nearest are {nearest}" if nearest else "the plan is empty")
    )


def _about_image(config: InstructConfig, folder: RunFolder, image: AnnotatedImage) -> str:
    """Return the ids to explain that are about an image, or why there are none."""
    ids = [one.sample_id for one in read_requests(folder) if one.image == image.id]
    if ids:
        return f"is an image; give the id of one of its samples: {', '.join(ids)}"
    guard = contamination.check([image], config.guard)
    if guard.refuses(image.id):
        lists = ", ".join(guard.evaluations[image.id])
        return f"is an image of {lists}, so no request is about it; {LEFT_OUT['of_evaluations'][1]}"
    if not image.captions and not image.boxes:
        return "has no boxes and no captions, so no request is about it"
    return "was not chosen, or no type was drawn for it; see images.count and requests.shares"


def _samples_of(path: Path, request: str) -> list[Sample]:
    """Return the file's samples from a request; other lines are not parsed."""
    if not path.exists():
        return []
    samples = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if request.encode() not in line:
                continue
            try:
                samples.append(Sample.model_validate_json(line))
            except ValidationError:
                raise UserError(
                    f"{path}:{number}: is not a sample; the file was damaged, run its stage again",
                    code="json_syntax",
                ) from None
    return samples


def _stages(
    folder: RunFolder, request: Request, answer: Answer | None, sample: Sample | None
) -> Iterator[Stage]:
    yield Stage("planned", True, f"request {request.id}")
    if answer is None:
        yield _unanswered(folder, request)
        return
    tokens = f"{answer.tokens_in:,} + {answer.tokens_out:,} tokens"
    yield Stage("answered", True, f"by {answer.teacher} {answer.model}, {tokens}")
    if sample is None:
        yield Stage("verified", None, "not verified yet")
        return
    if sample.judgment is not None:
        yield _judged(sample.judgment)
    if sample.status == "rejected":
        read = "" if sample.turns else "could not be parsed: "
        yield Stage("verified", False, f"rejected: {read}{', '.join(sample.reasons)}")
    else:
        yield Stage("verified", True, f"accepted, {len(sample.checks):,} checks")
    kept = next(iter(_samples_of(folder.kept, request.id)), None)
    dropped = _samples_of(folder.dropped, request.id)
    found = [*filter(None, [kept]), *dropped]
    decided = [check.claim for one in found for check in one.checks if check.rule == "review"]
    if decided:
        taken = not any(REVIEW_REJECTED in part.reasons for part in dropped)
        yield Stage("reviewed", taken, ", ".join(dict.fromkeys(decided)))
    elif sample.status == "rejected":
        return
    reasons = ", ".join(f"{part.id}: {', '.join(part.reasons)}" for part in dropped)
    if kept is not None:
        turns = f"; {len(dropped)} turns dropped ({reasons})" if dropped else ""
        yield Stage("cleaned", True, f"kept{turns}")
        yield _exported(folder, kept.id)
    elif dropped:
        yield Stage("cleaned", False, f"dropped: {reasons}")
    else:
        done = folder.kept.exists()
        words = "in neither output file of `clean`: run it again" if done else "not cleaned yet"
        yield Stage("cleaned", None, words)


def _judged(judgment: Judgment) -> Stage:
    listed = "; ".join(
        f"{found.verdict}: {found.statement!r} ({found.reason})" for found in judgment.objections
    )
    if judgment.verdict in WITHOUT_VERDICT:
        return Stage("judged", None, f"{judgment.verdict}: {judgment.note}")
    supported = judgment.verdict == "supported"
    words = "nothing objected" if supported else listed
    return Stage("judged", supported, f"{words}, by {judgment.model}")


def _unanswered(folder: RunFolder, request: Request) -> Stage:
    """Return why there is no answer: the last failure of the request."""
    failures = read_lines(folder.failures, Failure) if folder.failures.exists() else ()
    last = None
    for failure in failures:
        if failure.request == request.id:
            last = failure
    if last is None:
        return Stage("answered", None, "not asked yet")
    return Stage("answered", False, f"{last.reason}: {last.message}")


def _exported(folder: RunFolder, sample_id: str) -> Stage:
    path = folder.exports / RECEIPTS
    if not path.exists():
        return Stage("exported", None, "not exported yet")
    needle = json.dumps(sample_id).encode()
    with path.open("rb") as file:
        found = any(needle in line for line in file)
    if not found:
        return Stage("exported", False, "not in the exported files; see export.json")
    names = sorted({path.name for path in folder.exports.iterdir()} - {RECEIPTS, "export.json"})
    return Stage("exported", True, f"in {', '.join(names)}")


def _model(found: Explanation) -> str:
    """Return who answered, or will be asked."""
    answer = found.answer
    if answer is None:
        return str(found.request.parameters.get("model", ""))
    origin = f" ({found.sample.origin})" if found.sample else ""
    fingerprint = f", fingerprint {answer.fingerprint}" if answer.fingerprint else ""
    return f"{answer.model}{origin} through {answer.teacher}{fingerprint}"


def _cost(answer: Answer | None) -> str:
    if answer is None:
        return "nothing yet"
    price = "no price configured" if answer.usd is None else f"${answer.usd:.6f}"
    cached = f" ({answer.tokens_cached:,} cached)" if answer.tokens_cached else ""
    return (
        f"{answer.tokens_in:,} tokens in{cached}, {answer.tokens_out:,} out, {price}; "
        f"{answer.attempts} attempt{'' if answer.attempts == 1 else 's'}, "
        f"finish reason {answer.finish or 'not given'}"
    )


# --- files


def _inputs(config: InstructConfig, found: Explanation) -> list[str | Path]:
    """Return what must not be replaced: the run's files, its annotations and the image."""
    root = Path(config.output_dir)
    inputs: list[str | Path] = [*run_inputs(config)]
    inputs += [file for file in root.rglob("*") if file.is_file()]
    if found.image is not None:
        inputs.append(found.image_dir / found.image.file_name)
    return inputs


def _png(found: Explanation) -> bytes:
    """Return the image with the boxes that the teacher saw.

    Raises:
        UserError: The image is not in the index, or cannot be opened.
    """
    if found.image is None:
        raise UserError(f"image {found.request.image} is not in the index; run `index` again")
    opened = open_image(found.image_dir, found.image)
    checks = deciding_checks(found.sample) if found.sample else ()
    return draw_png(opened, drawn_boxes(found.image, found.request.shown, checks))


def _page(found: Explanation) -> bytes:
    """Return the sample as an HTML page."""
    request, sample = found.request, found.sample
    checks = deciding_checks(sample) if sample else ()
    name = found.image.file_name if found.image else "not in the index"
    page = render_page(
        "data_tools.instruct.report",
        "explain.html",
        title=request.sample_id,
        lead=f"{request.type}, image {request.image} ({name})",
        command="explain",
        styles=["sample.css", "explain.css"],
        script="sample.js",
        found=found,
        image=view_image(found.image, request.shown, checks, found.image_dir, brief=False)
        if found.image
        else None,
        view=view_sample(sample, found.image, found.image_dir, brief=False) if sample else None,
    )
    return page.encode()


# --- terminal


def show(console: Console, found: Explanation, *, whole_prompt: bool) -> None:
    """Print everything about a sample.

    Args:
        console: Where to print.
        found: The sample.
        whole_prompt: Print system text and seed examples too; otherwise only their size.
    """
    sample = found.sample
    name = found.image.file_name if found.image else "not in the index"
    title = Text(escape_control(found.request.sample_id), style="bold")
    console.print(
        title.append(f"  image {found.request.image}, {escape_control(name)}", style="dim")
    )
    stages = Table.grid(padding=(0, 1))
    for stage in found.stages:
        style = {True: "green", False: "bold red", None: "dim"}[stage.done]
        stages.add_row(Text(stage.symbol, style), stage.name, Text(escape_control(stage.words)))
    provenance = Table.grid(padding=(0, 2))
    for key, words in found.provenance.items():
        provenance.add_row(Text(key, style="dim"), Text(escape_control(words)))
    panels: dict[str, RenderableType] = {
        "stages": stages,
        "annotations in the prompt": Group(*_annotations(found)),
        "prompt": Group(*_prompt(found, whole_prompt)),
    }
    if found.answer is not None:
        panels["raw answer"] = Text(escape_control(found.answer.text))
    if sample is not None and sample.turns:
        panels["turns"] = Group(*_turns(sample))
    if sample is not None and sample.checks:
        panels[f"{len(sample.checks)} checks"] = _checks(sample, found.labels)
    panels["provenance"] = provenance
    for heading, content in panels.items():
        console.print(Panel(content, title=heading, title_align="left", border_style="dim"))


def _annotations(found: Explanation) -> Iterator[Text]:
    for label, caption in found.captions.items():
        yield Text(f"{label}  {escape_control(caption)}")
    boxes = [label for label in found.labels.values() if label[:1] == "b"]
    yield Text(escape_control(f"{len(boxes)} boxes: " + ", ".join(boxes)))
    counted = [f"{len(ids)} {name}" for name, ids in found.request.shown.summarised.items()]
    if counted:
        yield Text(escape_control(f"only counted: {', '.join(counted)}"))


def _prompt(found: Explanation, whole: bool) -> Iterator[Text]:
    fixed, own = found.messages[:-1], found.messages[-1]
    if not whole:
        size = sum(len(message["content"]) for message in fixed)
        yield Text(
            f"{len(fixed)} messages before it, the same in every {found.request.template} request: "
            f"{size:,} characters (--prompt shows them)",
            style="dim",
        )
    for message in (*fixed, own) if whole else (own,):
        yield Text(f"{message['role']}:", style="bold")
        yield Text(escape_control(message["content"]))


def _turns(sample: Sample) -> Iterator[Text]:
    for index, turn in enumerate(sample.turns):
        for letter, part, text in (("Q", "question", turn.question), ("A", "answer", turn.answer)):
            line = Text(f"{letter} ", style="bold")
            spans = claim_spans(sample.checks, index, part)
            yield line.append_text(_marked(text, sample.checks, spans))
        cited = ", ".join(turn.evidence) or "nothing"
        yield Text(escape_control(f"  {turn.kind}; cites {cited}"), style="dim")


def _marked(text: str, checks: Sequence[Check], spans: Mapping[int, tuple[int, int]]) -> Text:
    """Return the text with its claims in brackets, each with its verdict's symbol and number."""
    marked = Text()
    for piece in split_at_claims(text, spans):
        marked.append("[" * len(piece.opening), style="dim")
        worst = worst_verdict([checks[index] for index in piece.claims])
        marked.append(escape_control(piece.text), style=_STYLES[worst] if worst else "")
        for index in piece.closing:
            verdict = checks[index].verdict
            marked.append(f"]{SYMBOLS[verdict]}{index + 1}", style=_STYLES[verdict])
    return marked


def _checks(sample: Sample, labels: Mapping[int, str]) -> Table:
    table = Table(box=None, padding=(0, 1))
    for name in ("", "verdict", "rule", "claim", "checked against", "code"):
        table.add_column(name, overflow="fold")
    for number, check in enumerate(sample.checks, 1):
        style = _STYLES[check.verdict]
        table.add_row(
            Text(f"{SYMBOLS[check.verdict]}{number}", style=style),
            Text(check.verdict, style=style),
            Text(escape_control(check.rule)),
            Text(escape_control(check.claim)),
            Text(escape_control(cited_labels(check, labels))),
            Text(escape_control(check.code or ""), style="bold"),
        )
    return table
