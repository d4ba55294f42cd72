"""The requests of a grown run, operator by operator."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from data_tools.coco import AnnotatedImage
from data_tools.digests import hashed
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.grow import constraints
from data_tools.instruct.grow.operators import GROUPS, OPERATORS, grown_id, slug
from data_tools.instruct.grow.refusals import Share, TaskMaker
from data_tools.instruct.grow.seed_tasks import SeedTask
from data_tools.instruct.grow.several_images import MOST
from data_tools.instruct.grow.translation import ENGLISH
from data_tools.instruct.plan.command import parameters, request_of
from data_tools.instruct.plan.context import Context, describe, describe_several, quoted
from data_tools.instruct.plan.prompts import closing, description_requests
from data_tools.instruct.schema import Grown, Request, Sample, SampleType, Turn
from data_tools.instruct.verify.command import image_source
from data_tools.rules.facts import Facts

SEEDS: Final = 6
"""Seed tasks of a request of `self-instruct` (arXiv 2212.10560, section 2.2)."""
MADE: Final = 2
"""Questions of samples next to them."""


@dataclass(frozen=True)
class Material:
    """What requests are made from.

    Attributes:
        config: The run's.
        images: The index.
        categories: What annotators looked for in every image.
        chosen: Images for operators that make samples from an image.
        parents: Samples for the other operators.
        templates: The prompts by operator.
        language: Of translations; a key of `translation.LANGUAGES`.
        share: Of unanswerable questions in `refuse`.
        seeds: Seed tasks of `self-instruct`.
        begin: The first number of the requests of an operator that makes samples from an image;
            those of a run that is grown again go on from its own, so that none is asked twice.
    """

    config: InstructConfig
    images: Mapping[int, AnnotatedImage]
    categories: Sequence[str]
    chosen: Sequence[AnnotatedImage]
    parents: Sequence[Sample]
    templates: Mapping[str, Any]
    language: str
    share: Share
    seeds: Sequence[SeedTask] = ()
    begin: Mapping[str, int] = field(default_factory=dict)
    tasks: TaskMaker = field(init=False)

    def __post_init__(self) -> None:
        frequencies = Counter(name for i in self.images.values() for name in i.categories)
        object.__setattr__(self, "tasks", TaskMaker(self.categories, frequencies))

    def rng(self, *key: object) -> np.random.Generator:
        """Return a generator of this key, and of the run's seed."""
        return np.random.default_rng(hashed(self.config.seed, *key))

    def described(self, images: Sequence[AnnotatedImage]) -> Context:
        """Return the images in words."""
        shown = self.config.requests
        if len(images) == 1:
            return describe(images[0], shown.decimals, shown.max_boxes, shown.min_area)
        return describe_several(images, shown.decimals, shown.max_boxes, shown.min_area)


def make_requests(material: Material, operators: Sequence[str], number: int) -> Iterator[Request]:
    """Yield the requests, `number` for each operator and sample, image or group of images.

    Args:
        material: What they are made from.
        operators: Names of `OPERATORS` or `GROUPS`.
        number: How many of each.
    """
    of_samples = [n for n in operators if n in GROUPS or OPERATORS[n].source == "sample"]
    for parent in material.parents:
        for name in of_samples:
            for repeat in range(number):
                operator = drawn(material, operators, name, parent, repeat)
                if grows(parent, operator, material.language):
                    yield _of_sample(material, parent, operator, repeat)
    of_images = {"self-instruct": _self_instruct, "refuse": _refuse}
    for name in operators:
        begin = material.begin.get(name, 0)
        for image in material.chosen if name in of_images else ():
            for repeat in range(begin, begin + number):
                yield from of_images[name](material, image, repeat)
    if "multi-image" in operators:
        for repeat in range(number):
            yield from _several_images(material, repeat)


def drawn(
    material: Material, operators: Sequence[str], name: str, parent: Sample, repeat: int
) -> str:
    """Return an operator; of a group one that is not named beside it, drawn for the sample."""
    if name not in GROUPS:
        return name
    members = [one for one in GROUPS[name] if one not in operators]
    return members[hashed(material.config.seed, name, parent.id, repeat) % len(members)]


def _of_sample(material: Material, parent: Sample, operator: str, repeat: int) -> Request:
    """Return the request that makes a new sample of a parent."""
    image = material.images[parent.image.id]
    grown = Grown(operator=operator, parents=(parent.id,))
    question, sample_type, name = None, parent.type, operator
    if operator == "translate":
        grown = grown.model_copy(update={"language": material.language})
        context = Context(talk(parent.turns, True), parent.shown)
        name = f"{operator}-{slug(material.language)}"
    else:
        described = material.described([image])
        shows_answers = OPERATORS[operator].shows_answers
        context = Context(
            f"{described.text}\n\n{talk(parent.turns, shows_answers)}", described.shown
        )
    if operator == "constraints":
        rng = material.rng("constraints", parent.id, repeat)
        names = Facts(image, context.shown).present
        demands = constraints.draw(rng, int(rng.integers(2, 5)), names)
        grown = grown.model_copy(update={"constraints": demands})
        bases = description_requests(material.config.requests.prompts)
        base = bases[hashed(material.config.seed, "base", parent.id, repeat) % len(bases)]
        question, sample_type = constraints.instruction(base, demands), "detail"
    return _request(
        material, grown, image, context, grown_id(parent.id, name, repeat),
        key=(parent.id, operator, repeat), number=repeat, question=question,
        sample_type=sample_type,
    )  # fmt: skip


def _self_instruct(material: Material, image: AnnotatedImage, repeat: int) -> Iterator[Request]:
    """Yield the request for new questions after seed tasks and questions about other images."""
    rng = material.rng("self-instruct", image.id, repeat)
    seeds = [material.seeds[i] for i in rng.permutation(len(material.seeds))[:SEEDS]]
    others = [
        one
        for one in material.parents
        if one.image.id != image.id and grows(one, "self-instruct", material.language)
    ]
    made = [others[i] for i in rng.permutation(len(others))[:MADE]]
    texts = [seed.question for seed in seeds]
    texts += [one.turns[int(rng.integers(len(one.turns)))].question for one in made]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    context = material.described([image])
    lines = ["TASKS (about other images):", *(f"- {quoted(text)}" for text in texts)]
    parents = (*(f"seed:{seed.id}" for seed in seeds), *(one.id for one in made))
    yield _request(
        material, Grown(operator="self-instruct", parents=parents), image,
        Context(context.text + "\n\n" + "\n".join(lines), context.shown),
        grown_id(f"{image.id:012d}-conversation", "self-instruct", repeat),
        key=(image.id, "self-instruct", repeat), number=repeat,
    )  # fmt: skip


def _refuse(material: Material, image: AnnotatedImage, repeat: int) -> Iterator[Request]:
    """Yield the request to answer questions of which some have no answer, if there are any."""
    context = material.described([image])
    rng = material.rng("refuse", image.id, repeat)
    facts = Facts(image, context.shown)
    unanswerable = material.tasks.unanswerable(facts, rng)
    taken = material.share.take(unanswerable, material.tasks.answerable(facts, rng))
    if not taken:
        return
    tasks = tuple(taken[i] for i in rng.permutation(len(taken)))
    turns = [Turn(question=task.question, answer="", kind=task.kind) for task in tasks]
    yield _request(
        material, Grown(operator="refuse", tasks=tasks), image,
        Context(f"{context.text}\n\n{talk(turns, False)}", context.shown),
        grown_id(f"{image.id:012d}-conversation", "refuse", repeat),
        key=(image.id, "refuse", repeat), number=repeat,
    )  # fmt: skip


def _several_images(material: Material, repeat: int) -> Iterator[Request]:
    """Yield requests about groups of two to four images, in each of which much is alike."""
    seed = material.config.seed
    usable = (one for one in material.parents if grows(one, "multi-image", material.language))
    first = {parent.image.id: parent for parent in reversed(tuple(usable))}

    def order(parent: Sample) -> tuple[str, int]:
        names = material.images[parent.image.id].categories
        return min(names, default=""), hashed(seed, "several", parent.id, repeat)

    waiting = sorted(first.values(), key=order)
    rng = material.rng("multi-image", repeat)
    while len(waiting) > 1:
        size = min(int(rng.integers(2, MOST + 1)), len(waiting))
        group, waiting = waiting[:size], waiting[size:]
        images = [material.images[parent.image.id] for parent in group]
        context = material.described(images)
        said = [f"About image {n}:\n{talk(p.turns, True)}" for n, p in enumerate(group, 1)]
        grown = Grown(
            operator="multi-image",
            parents=tuple(parent.id for parent in group),
            images=tuple(image_source(image) for image in images[1:]),
        )
        yield _request(
            material, grown, images[0],
            Context("\n\n".join([context.text, *said]), context.shown),
            grown_id(group[0].id, "multi-image", repeat),
            key=(group[0].id, "multi-image", repeat), number=repeat,
        )  # fmt: skip


def _request(
    material: Material,
    grown: Grown,
    image: AnnotatedImage,
    context: Context,
    sample_id: str,
    *,
    key: tuple[object, ...],
    number: int,
    question: str | None = None,
    sample_type: SampleType = "conversation",
) -> Request:
    template = material.templates[grown.operator]
    content = {
        "image": image.id,
        "type": sample_type,
        "number": number,
        "template": grown.operator,
        "template_sha256": template["sha256"],
        "question": question,
        "context": closing(context.text, template["ask"], question or ""),
        "parameters": parameters(
            material.config.teacher, hashed(material.config.seed, "grow", *key)
        ),
        "shown": context.shown,
    }
    return request_of(content).model_copy(update={"sample_id": sample_id, "grown": grown})


def grows(sample: Sample, operator: str, language: str) -> bool:
    """Return whether an operator makes something of a sample.

    Translations are only translated back, since the other operators read and write English; the
    question of a description is ours; and a sample about several images has no one image to ask
    about.
    """
    if sample.type not in ("conversation", "reasoning") or len(sample.images) > 1:
        return False
    is_english = sample.grown is None or sample.grown.language in (None, ENGLISH)
    return is_english != (operator == "translate" and language == ENGLISH)


def talk(turns: Sequence[Turn], with_answers: bool) -> str:
    """Return turns, a line each, so that none can pass for another one."""
    lines = ["QUESTIONS AND ANSWERS:" if with_answers else "QUESTIONS:"]
    for number, turn in enumerate(turns, 1):
        lines.append(f"q{number}: {quoted(turn.question)}")
        if with_answers:
            lines.append(f"a{number}: {quoted(turn.answer)}")
    return "\n".join(lines)
