"""Choose images, write the requests about them, and estimate their cost; nothing is sent."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

from data_tools.coco import AnnotatedImage
from data_tools.digests import hashed
from data_tools.instruct import contamination
from data_tools.instruct import index as indexing
from data_tools.instruct.config import InstructConfig, TeacherConfig
from data_tools.instruct.lines import read_lines, write_lines
from data_tools.instruct.plan.context import describe
from data_tools.instruct.plan.estimate import Tally, estimate_lines
from data_tools.instruct.plan.prompts import TYPES, closing, digest, make_templates, messages
from data_tools.instruct.plan.selection import choose, types_of
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Request
from vlm_sft.config import loading as settings
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import write_owned, write_owned_json
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import read_json

LEFT_OUT: Final = {
    "of_evaluations": (
        "evaluation images",
        "refused, guard.allow_evaluation_images=true keeps them",
    ),
    "without_annotations": ("without boxes and captions", "there is nothing to ask about"),
    "not_chosen": ("not chosen", "images.count is smaller"),
    "chosen_without_a_type": (
        "without a request",
        "no type was drawn for them; larger requests.shares ask about more images",
    ),
}
"""Reasons for asking nothing about images, by name in plan.json, and explanations."""


class _Sample(msgspec.Struct):
    """What is needed of a line of samples.jsonl and rejected.jsonl."""

    request: str


_SAMPLE: Final = msgspec.json.Decoder(_Sample)


def command(config: InstructConfig, show: int = 0) -> None:
    """Write the requests and what they will cost; nothing is sent.

    Args:
        config: The run's.
        show: How many requests to print in full.
    """
    indexing.command(config)
    folder = RunFolder(Path(config.output_dir))
    images = list(indexing.read_images(folder).values())
    categories = indexing.read_categories(folder)
    templates = make_templates(categories, config.requests.decimals, config.requests.prompts)
    guard = contamination.check(images, config.guard)
    usable = [image for image in images if not guard.refuses(image.id)]
    known = [image for image in usable if image.captions or image.boxes]
    chosen = choose(known, config.images.count, config.images.choose, config.seed)
    left_out = {
        "of_evaluations": len(images) - len(usable),
        "without_annotations": len(usable) - len(known),
        "not_chosen": len(known) - len(chosen),
    }
    tally = Tally(templates)
    requests = make_requests(track(chosen, description="planning"), templates, config)
    stale = _verified(folder)
    requests = _without(stale, requests)
    write_lines(folder.requests, _at_least_one(tally.through(requests), left_out))
    left_out["chosen_without_a_type"] = len(chosen) - tally.images
    write_owned_json(folder.templates, templates)
    write_owned(folder.config, settings.dump(config).encode())
    plan = {
        "images": {"indexed": len(images), "asked_about": tally.images},
        "left_out": left_out,
        "guard": guard.as_dict(),
        **tally.as_dict(config.teacher),
    }
    write_owned_json(folder.plan, plan)
    asked = f"{tally.images:,} of {len(images):,} images are asked about{_in_words(left_out)}"
    echo("\n".join([*guard.lines(), asked, *estimate_lines(plan, config)]), file=sys.stdout)
    if stale:
        echo(
            f"warning: {stale.total():,} verified samples are about requests that are not in this "
            f"plan, so {_existing_results(folder)} are those of another plan and `report` and "
            "`explain` may refuse them; repeat the later stages for this plan, or `plan` with the "
            "former settings for those samples (their answers are kept)",
            file=sys.stdout,
        )
    for request in islice(read_requests(folder), show):
        echo(f"\n===== {request.sample_id}, request {request.id}", file=sys.stdout)
        for message in messages(request, templates):
            echo(f"----- {message['role']}\n{message['content']}", file=sys.stdout)


def _verified(folder: RunFolder) -> Counter[str]:
    """Return the number of samples, accepted and rejected ones, by their requests' ids."""
    found: Counter[str] = Counter()
    for path in (folder.samples, folder.rejected):
        if path.is_file():
            with path.open("rb") as file, suppress(msgspec.DecodeError):
                found.update(sample.request for sample in map(_SAMPLE.decode, file))
    return found


def _without(known: Counter[str], requests: Iterable[Request]) -> Iterator[Request]:
    """Yield the requests, and remove each from `known`."""
    for request in requests:
        known.pop(request.id, None)
        yield request


def _existing_results(folder: RunFolder) -> str:
    results = (
        folder.samples, folder.rejected, folder.kept, folder.dropped, folder.exports, folder.report,
    )  # fmt: skip
    return ", ".join(path.name for path in results if path.exists())


def read_requests(folder: RunFolder) -> Iterator[Request]:
    """Yield the run's requests, in the order that every later file keeps.

    Raises:
        UserError: Nothing has been planned yet.
    """
    return read_lines(folder.requests, Request)


def read_templates(folder: RunFolder) -> Mapping[str, Any]:
    """Return the prompts by name: `messages` (the fixed beginning), `answer_schema`, `sha256`, ...

    Raises:
        UserError: Nothing has been planned yet.
    """
    try:
        templates: Mapping[str, Any] = read_json(folder.templates)
    except FileNotFoundError:
        raise UserError(
            f"{folder.templates}: there is no such file; run `plan` first",
            code="data_file_missing",
        ) from None
    if not isinstance(templates, dict) or not templates.keys() >= set(TYPES):
        raise UserError(
            f"{folder.templates}: was damaged or not written by this version; run `plan` again",
            code="json_syntax",
        )
    return templates


def make_requests(
    images: Iterable[AnnotatedImage], templates: Mapping[str, Any], config: InstructConfig
) -> Iterator[Request]:
    """Yield the requests in the order of images, types and numbers.

    A request depends on its own image, the templates, the seed and the teacher's parameters only.
    """
    shown = config.requests
    for image in images:
        context = describe(image, shown.decimals, shown.max_boxes, shown.min_area)
        for sample_type, number in types_of(image.id, shown.shares, config.seed):
            template = templates[sample_type]
            question = _question(template["questions"], image.id, number, config.seed)
            seed = hashed(config.seed, "request", image.id, sample_type, number)
            content = {
                "image": image.id,
                "type": sample_type,
                "number": number,
                "template": sample_type,
                "template_sha256": template["sha256"],
                "question": question,
                "context": closing(context.text, template["ask"], question or ""),
                "parameters": parameters(config.teacher, seed),
                "shown": context.shown,
            }
            yield request_of(content)


def request_of(content: Mapping[str, Any]) -> Request:
    """Return a request with the id of its sample and its own, the digest of everything else."""
    sample_id = f"{content['image']:012d}-{content['type']}-{content['number']}"
    request = Request(id="", sample_id=sample_id, **content)
    return request.model_copy(update={"id": request_id(request)})


def request_id(request: Request) -> str:
    """Return the SHA-256 of canonical JSON of everything that determines the answer.

    The fixed messages and the answer's schema are in it by `template_sha256`, the last message as
    `context`.
    """
    return digest(request.model_dump(mode="json", exclude={"id", "sample_id", "grown"}))


def parameters(teacher: TeacherConfig, seed: int) -> dict[str, Any]:
    """Return what is sent in addition to the messages: all values, since servers' defaults differ.

    Args:
        teacher: `rules` has no sampling parameters.
        seed: Any whole number; servers get 31 bits of it.
    """
    if teacher.kind == "rules":
        return {"model": teacher.model or "rules", "seed": seed % 2**31}
    return {
        "model": teacher.model,
        "temperature": teacher.temperature,
        "top_p": teacher.top_p,
        "max_tokens": teacher.max_tokens,
        "seed": seed % 2**31,
    }


def _question(questions: Sequence[str], image_id: int, number: int, seed: int) -> str | None:
    if not questions:
        return None
    return questions[(hashed(seed, "question", image_id) + number) % len(questions)]


def _at_least_one(requests: Iterable[Request], left_out: Mapping[str, int]) -> Iterator[Request]:
    """Yield the requests; raise an error if there are none, before the old file is replaced."""
    some = False
    for request in requests:
        some = True
        yield request
    if not some:
        raise UserError(
            f"no requests can be made{_in_words(left_out)}; see images, guard "
            "(guard.allow_evaluation_images=true keeps evaluation images) and requests.shares in "
            "the configuration",
            code="no_records",
        )


def _in_words(left_out: Mapping[str, int]) -> str:
    words = [f"{count:,} {LEFT_OUT[name][0]}" for name, count in left_out.items() if count]
    return f"; left out: {', '.join(words)}" if words else ""
