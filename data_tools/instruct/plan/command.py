"""Images become requests: chosen, guarded, written down and priced before anything is sent."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from data_tools.coco import AnnotatedImage
from data_tools.instruct import contamination as guard
from data_tools.instruct import index as indexing
from data_tools.instruct.config import InstructConfig, TeacherConfig
from data_tools.instruct.lines import read_lines, write_lines
from data_tools.instruct.plan.context import describe
from data_tools.instruct.plan.prompts import TYPES, closing, digest, make_templates, messages
from data_tools.instruct.plan.selection import choose, integer, types_of
from data_tools.instruct.plan.tokens import estimate_tokens
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Request, SampleType
from vlm_sft.config import loading as settings
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import write_owned, write_owned_json
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import read_json

MESSAGE_TOKENS: Final = 4
"""What a chat template adds around a message."""
PAID: Final = ("openai", "batch")


def command(config: InstructConfig, show: int = 0) -> None:
    """Write the requests and what they will take; nothing is sent.

    Args:
        config: The run's.
        show: How many requests to print in full.
    """
    indexing.command(config)
    folder = RunFolder(Path(config.output_dir))
    images = list(indexing.read_images(folder).values())
    categories = indexing.read_categories(folder)
    templates = make_templates(categories, config.requests.decimals, config.requests.prompts)
    guarded = guard.check(images, config.guard)
    chosen, left_out = _choose(images, guarded, config)
    tally = Tally(templates)
    requests = make_requests(track(chosen, description="planning"), templates, config)
    write_lines(folder.requests, _not_none(tally.through(requests), left_out))
    write_owned_json(folder.templates, templates)
    write_owned(folder.config, settings.dump(config).encode())
    told = {
        "images": {"indexed": len(images), "asked_about": tally.images},
        "left_out": {**left_out, "chosen_without_a_type": len(chosen) - tally.images},
        "guard": guarded.told(),
        **tally.told(config.teacher),
    }
    write_owned_json(folder.plan, told)
    echo("\n".join([*guarded.lines(), *_table(told, config)]), file=sys.stdout)
    for request in islice(read_requests(folder), show):
        echo("\n".join(_in_full(request, templates)), file=sys.stdout)


def read_requests(folder: RunFolder) -> Iterator[Request]:
    """The run's requests, one at a time, in the order that every later file keeps.

    Raises:
        UserError: Nothing has been planned yet.
    """
    return read_lines(folder.requests, Request)


def read_templates(folder: RunFolder) -> Mapping[str, Any]:
    """The prompts by name: `messages` (the fixed beginning), `answer_schema`, `sha256`, ...

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


def _choose(
    images: Sequence[AnnotatedImage], guarded: guard.Guard, config: InstructConfig
) -> tuple[list[AnnotatedImage], dict[str, int]]:
    """The images to ask about, and how many are left out for what."""
    usable = [image for image in images if not guarded.refuses(image.id)]
    known = [image for image in usable if image.captions or image.boxes]
    chosen = choose(known, config.images.count, config.images.choose, config.seed)
    return chosen, {
        "of_evaluations": len(images) - len(usable),
        "without_annotations": len(usable) - len(known),
        "not_chosen": len(known) - len(chosen),
    }


def _not_none(requests: Iterable[Request], left_out: Mapping[str, int]) -> Iterator[Request]:
    """The requests unchanged; an error where there are none, before the old file is replaced."""
    some = False
    for request in requests:
        some = True
        yield request
    if not some:
        told = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in left_out.items() if n)
        raise UserError(
            f"no request is left to make (images left out: {told or 'none'}); see images, "
            "guard (guard.allow_evaluation_images=true keeps images of evaluations) and "
            "requests.shares in the configuration",
            code="no_records",
        )


def make_requests(
    images: Iterable[AnnotatedImage], templates: Mapping[str, Any], config: InstructConfig
) -> Iterator[Request]:
    """The requests in the order of images, types and numbers.

    A request depends on its own image, the templates, the seed and the teacher's parameters only.
    """
    for image in images:
        context = describe(
            image,
            config.requests.decimals,
            config.requests.max_boxes,
            config.requests.min_area,
        )
        for sample_type, number in types_of(image.id, config.requests.shares, config.seed):
            template = templates[sample_type]
            what = (image.id, sample_type, number)
            question = _question(template["questions"], image.id, number, config.seed)
            content = {
                "image": image.id,
                "type": sample_type,
                "number": number,
                "template": sample_type,
                "template_sha256": template["sha256"],
                "question": question,
                "context": closing(context.text, template["ask"], question or ""),
                "parameters": parameters(config.teacher, integer(config.seed, "request", *what)),
                "shown": context.shown,
            }
            yield request_of(content)


def request_of(content: Mapping[str, Any]) -> Request:
    """A request with its sample's id, and its own: the digest of all the rest."""
    sample_id = f"{content['image']:012d}-{content['type']}-{content['number']}"
    unnamed = Request(id="", sample_id=sample_id, **content)
    return unnamed.model_copy(update={"id": request_id(unnamed)})


def request_id(request: Request) -> str:
    """SHA-256 of canonical JSON of all that determines the answer.

    The fixed messages and the answer's schema are in it by `template_sha256`, the last message as
    `context`.
    """
    return digest(request.model_dump(mode="json", exclude={"id", "sample_id"}))


def parameters(teacher: TeacherConfig, seed: int) -> dict[str, Any]:
    """What is sent beside the messages, every value said; servers have defaults of their own.

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
    return questions[(integer(seed, "question", image_id) + number) % len(questions)]


@dataclass
class Tally:
    """What the requests that went through add up to."""

    templates: Mapping[str, Any]
    requests: Counter[SampleType] = field(default_factory=Counter)
    context_tokens: Counter[SampleType] = field(default_factory=Counter)
    images: int = 0
    boxes_listed: int = 0
    boxes_by_number: int = 0
    _last: int | None = None

    def through(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The requests unchanged, counted."""
        for request in requests:
            self.requests[request.type] += 1
            self.context_tokens[request.type] += estimate_tokens(request.context) + MESSAGE_TOKENS
            if request.image != self._last:
                self._last = request.image
                self.images += 1
                self.boxes_listed += len(request.shown.boxes)
                self.boxes_by_number += sum(map(len, request.shown.summarised.values()))
            yield request

    def told(self, teacher: TeacherConfig) -> dict[str, Any]:
        """By type and in all: requests, tokens in, of these repeated prefix, out; US dollars."""
        types = {name: self._of(name, teacher) for name in TYPES if self.requests[name]}
        total = {key: sum(of[key] for of in types.values()) for key in next(iter(types.values()))}
        return {
            "boxes": {"listed": self.boxes_listed, "by_number_only": self.boxes_by_number},
            "requests": {**types, "all": total},
            "usd": _usd(total, teacher),
        }

    def _of(self, name: SampleType, teacher: TeacherConfig) -> dict[str, int]:
        """Answers are taken to be as long as the seed examples' are."""
        fixed, count = self.templates[name]["messages"], self.requests[name]
        prefix = sum(estimate_tokens(message["content"]) + MESSAGE_TOKENS for message in fixed)
        answers = [m["content"] for m in fixed if m["role"] == "assistant"]
        long = sum(map(estimate_tokens, answers)) / len(answers)
        return {
            "requests": count,
            "tokens_in": prefix * count + self.context_tokens[name],
            "repeated_prefix": prefix * (count - 1),
            "tokens_out": round(min(long, teacher.max_tokens) * count),
            "tokens_out_at_most": teacher.max_tokens * count,
        }


def _usd(total: Mapping[str, int], teacher: TeacherConfig) -> dict[str, float] | None:
    if teacher.prices is None or teacher.kind not in PAID:
        return None
    prices = teacher.prices
    cached = prices.input if prices.cached is None else prices.cached
    output = total["tokens_out"] * prices.output
    full = total["tokens_in"] * prices.input + output
    saved = total["repeated_prefix"] * (prices.input - cached)
    most = full - output + total["tokens_out_at_most"] * prices.output
    amounts = {"nothing_cached": full, "prefixes_cached": full - saved, "longest_answers": most}
    return {name: round(amount / 1e6, 4) for name, amount in amounts.items()}


def _table(told: Mapping[str, Any], config: InstructConfig) -> Iterator[str]:
    left = ", ".join(
        f"{count:,} {name.replace('_', ' ')}" for name, count in told["left_out"].items() if count
    )
    boxes = told["boxes"]
    yield (
        f"{told['images']['asked_about']:,} of {told['images']['indexed']:,} images are "
        f"asked about{'; left out: ' + left if left else ''}"
    )
    yield (
        f"{boxes['listed']:,} boxes are shown, {boxes['by_number_only']:,} told by number only "
        "(small, or beyond requests.max_boxes)"
    )
    yield f"{'type':<14}{'requests':>10}{'tokens in':>15}{'of it prefix':>15}{'tokens out':>14}"
    for name, of in told["requests"].items():
        yield (
            f"{name:<14}{of['requests']:>10,}{of['tokens_in']:>15,}"
            f"{of['repeated_prefix']:>15,}{of['tokens_out']:>14,}"
        )
    yield from _money(told, config)


def _money(told: Mapping[str, Any], config: InstructConfig) -> Iterator[str]:
    if config.verify.judge is not None:
        yield "the judge (verify.judge) is not in the estimate: `verify` asks it about every sample"
    if config.teacher.kind not in PAID:
        yield f"teacher {config.teacher.kind}: nothing is sent and nothing paid"
        return
    total, usd = told["requests"]["all"], told["usd"]
    share = total["repeated_prefix"] / total["tokens_in"]
    yield (
        f"estimated without a tokenizer; answers as long as the seed examples'. {share:.0%} of the "
        "tokens in are the same beginning again: what a server's prefix cache can save"
    )
    if usd is None:
        yield "no teacher.prices in the configuration: no estimate of money"
    else:
        yield (
            f"about {usd['prefixes_cached']:,.2f} US dollars with every prefix cached, "
            f"{usd['nothing_cached']:,.2f} with none; {usd['longest_answers']:,.2f} if every "
            f"answer took teacher.max_tokens"
        )
    limits = config.limits
    for name, limit, need in (
        ("requests", limits.requests, total["requests"]),
        ("tokens", limits.tokens, total["tokens_in"] + total["tokens_out"]),
        ("usd", limits.usd, usd["nothing_cached"] if usd else 0),
    ):
        if limit is not None and need > limit:
            yield f"limits.{name} {limit:,} is below that: generation will stop there"


def _in_full(request: Request, templates: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n===== {request.sample_id}, request {request.id}"
    for message in messages(request, templates):
        yield f"----- {message['role']}\n{message['content']}"
