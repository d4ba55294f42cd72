"""The figures of a run, counted in one pass: what became of the requests, what they say, cost."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from data_tools.coco import AnnotatedImage
from data_tools.instruct.clean.choices import VALUES, Categories, Family, choice_of
from data_tools.instruct.report.counting import Openings, Reservoir
from data_tools.instruct.report.journeys import Journey, Outcome
from data_tools.instruct.schema import Answer, Cost, Sample, SampleType, Turn, Verdict
from data_tools.instruct.verify.codes import NOT_CLAIMS

TYPES: Final[tuple[SampleType, ...]] = get_args(SampleType)

Step = Literal["planned", "answered", "read", "accepted", "kept"]

STEPS: Final[dict[Step, str]] = {
    "planned": "requests planned",
    "answered": "answered",
    "read": "read as turns",
    "accepted": "accepted by all checks",
    "kept": "kept after cleaning",
}
"""The funnel's steps in their order, each a part of the one before."""

EXAMPLES: Final = 5
"""Imaged examples of a reason."""
GALLERY: Final = 20
"""Good and rejected samples drawn at random."""
LONGEST: Final = 400
"""Words; longer texts are counted with these."""
MOST_MAKERS: Final = 1000


@dataclass
class Spending:
    """What answers took; `usd` is of those with a price, the others are `unpriced`."""

    answers: int = 0
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    unpriced: int = 0

    def add(self, cost: "Cost | Answer | Spending") -> None:
        """Count an answer, or what others took."""
        self.tokens_in += cost.tokens_in
        self.tokens_cached += cost.tokens_cached
        self.tokens_out += cost.tokens_out
        self.usd += cost.usd or 0.0
        self.answers += cost.answers if isinstance(cost, Spending) else 1
        self.unpriced += cost.unpriced if isinstance(cost, Spending) else cost.usd is None

    @property
    def is_priced(self) -> bool:
        """Whether there is a sum of money to speak of."""
        return self.answers > self.unpriced


@dataclass(frozen=True)
class Maker:
    """Who made samples, and how; `parameters` is JSON, without `seed`."""

    origin: str
    model: str
    type: SampleType
    template: str
    template_sha256: str
    parameters: str


@dataclass
class Good:
    """What the samples say that are to be trained on.

    Attributes:
        images: Images with such a sample, by their licence (COCO's number).
        covered: Images with such a sample, by the categories annotated in them.
        cited: Samples with a claim that rests on a box of the category.
        words: Texts by type, part and number of words.
        kinds: Turns by what they ask.
        choices: Answers to questions that are a choice, by family and answer.
        yes_no: Answers yes or no, by the categories that the question names.
    """

    categories: Categories

    samples: int = 0
    origins: Counter[str] = field(default_factory=Counter)
    images: Counter[int | None] = field(default_factory=Counter)
    covered: Counter[str] = field(default_factory=Counter)
    cited: Counter[str] = field(default_factory=Counter)
    words: Counter[tuple[SampleType, str, int]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    choices: Counter[tuple[Family, str]] = field(default_factory=Counter)
    yes_no: Counter[tuple[str, str]] = field(default_factory=Counter)
    questions: Openings = field(default_factory=Openings)
    answers: Openings = field(default_factory=Openings)
    _seen: set[int] = field(default_factory=set)

    def add(self, sample: Sample, image: AnnotatedImage | None) -> None:
        """Count one sample."""
        self.samples += 1
        self.origins[sample.origin] += 1
        if sample.image.id not in self._seen:
            self._seen.add(sample.image.id)
            self.images[sample.image.license] += 1
            self.covered.update(image.categories if image else ())
        cited = {number for check in sample.checks for number in check.evidence}
        self.cited.update({box.category for box in image.boxes if box.id in cited} if image else ())
        for turn in sample.turns:
            self.kinds[turn.kind] += 1
            self.questions.add(turn.question)
            self.answers.add(turn.answer)
            for part, text in (("question", turn.question), ("answer", turn.answer)):
                self.words[sample.type, part, min(len(text.split()), LONGEST)] += 1
            self._add_choice(turn)

    def _add_choice(self, turn: Turn) -> None:
        choice = choice_of(turn)
        if choice is None:
            return
        said = VALUES[choice.family][choice.value]
        self.choices[choice.family, said] += 1
        if choice.family == "yes_no":
            self.yes_no.update((name, said) for name in self.categories.named(turn.question))


@dataclass
class Figures:
    """All counts of a report.

    Attributes:
        images: Indexed ones; `asked`: of these, images with a request.
        annotated: Images by the categories annotated in them.
        steps: Requests by type that came to a step.
        outcomes: Requests by where they stand.
        lost: Requests that did not come to a step, by what stopped them: the first reason.
        rejections, set_asides: Samples with a code, of which one may have several, by type.
        turns_set_aside: Turns taken out of samples that were kept, by code.
        claims: Checks of claims about the image by rule and verdict, over all verified samples.
        claims_by_type: The same by the sample's type and verdict.
        other_checks: Checks of form, manner and citations by rule and verdict.
        good: Of the samples that are `good_outcome`.
        spending: By type, all answers, whatever became of them.
        examples: Samples by the code that rejected them or set them aside.
        gallery: Samples by outcome.
    """

    seed: int
    good_outcome: Literal["kept", "accepted"]
    good: Good
    images: int = 0
    asked: set[int] = field(default_factory=set)
    annotated: Counter[str] = field(default_factory=Counter)
    steps: Counter[tuple[SampleType, Step]] = field(default_factory=Counter)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    lost: Counter[tuple[Step, str]] = field(default_factory=Counter)
    turns_set_aside: Counter[str] = field(default_factory=Counter)
    rejections: Counter[tuple[str, SampleType]] = field(default_factory=Counter)
    set_asides: Counter[tuple[str, SampleType]] = field(default_factory=Counter)
    claims: Counter[tuple[str, Verdict]] = field(default_factory=Counter)
    other_checks: Counter[tuple[str, Verdict]] = field(default_factory=Counter)
    claims_by_type: Counter[tuple[SampleType, Verdict]] = field(default_factory=Counter)
    spending: defaultdict[SampleType, Spending] = field(
        default_factory=lambda: defaultdict(Spending)
    )
    makers: Counter[Maker] = field(default_factory=Counter)
    examples: dict[str, Reservoir[Journey]] = field(default_factory=dict)
    gallery: dict[Outcome, Reservoir[Journey]] = field(default_factory=dict)

    def step(self, name: Step, sample_type: SampleType | None = None) -> int:
        """Requests that came to a step."""
        types = TYPES if sample_type is None else (sample_type,)
        return sum(self.steps[found, name] for found in types)

    def total_spending(self) -> Spending:
        """Over all types."""
        total = Spending()
        for spending in self.spending.values():
            total.add(spending)
        return total


def by_code(counts: Mapping[tuple[str, Any], int]) -> list[tuple[str, int]]:
    """Samples by code over all types, the commonest first."""
    total: Counter[str] = Counter()
    for (code, _), count in counts.items():
        total[code] += count
    return sorted(total.items(), key=lambda entry: (-entry[1], entry[0]))


def gather(
    found: Iterable[Journey],
    images: Mapping[int, AnnotatedImage],
    *,
    seed: int,
    good_outcome: Literal["kept", "accepted"],
) -> Figures:
    """Count requests with what became of them.

    Args:
        found: In any order; the figures do not depend on it.
        images: The index.
        seed: Of the random choice of examples.
        good_outcome: Which samples are the ones to train on: `kept` once they have been cleaned.
    """
    annotated = Counter(name for image in images.values() for name in image.categories)
    good = Good(Categories(annotated))
    figures = Figures(seed, good_outcome, good, images=len(images), annotated=annotated)
    for journey in found:
        _add(figures, journey, images.get(journey.request.image))
    return figures


def _add(figures: Figures, journey: Journey, image: AnnotatedImage | None) -> None:
    request, sample = journey.request, journey.sample
    figures.asked.add(request.image)
    figures.outcomes[journey.outcome] += 1
    for step in _steps(journey):
        figures.steps[request.type, step] += 1
    if journey.outcome != "kept":
        figures.lost[_lost(journey)] += 1
    if journey.answer is not None:
        figures.spending[request.type].add(journey.answer)
    if sample is None:
        return
    figures.spending[sample.type].add(sample.cost)
    _add_maker(figures, sample)
    _add_reasons(figures, journey)
    for check in sample.checks:
        if check.rule in NOT_CLAIMS:
            figures.other_checks[check.rule, check.verdict] += 1
            continue
        figures.claims[check.rule, check.verdict] += 1
        figures.claims_by_type[sample.type, check.verdict] += 1
    gallery = figures.gallery.setdefault(journey.outcome, Reservoir(GALLERY, figures.seed))
    gallery.add(sample.id, journey)
    if journey.outcome == figures.good_outcome:
        figures.good.add(journey.kept or sample, image)


def _steps(journey: Journey) -> list[Step]:
    steps: list[Step] = ["planned"]
    if journey.outcome != "unanswered":
        steps.append("answered")
    if journey.sample is not None and journey.sample.turns:
        steps.append("read")
    if journey.outcome in ("accepted", "set_aside", "kept"):
        steps.append("accepted")
    if journey.outcome == "kept":
        steps.append("kept")
    return steps


def _lost(journey: Journey) -> tuple[Step, str]:
    """The step that a request did not come to, and what stopped it."""
    first = journey.reasons[0] if journey.reasons else "no reason given"
    if journey.outcome == "rejected":
        return ("accepted" if journey.sample and journey.sample.turns else "read"), first
    stopped: dict[Outcome, tuple[Step, str]] = {
        "unanswered": ("answered", journey.reasons[0] if journey.reasons else "not asked yet"),
        "unverified": ("read", "not verified yet"),
        "accepted": ("kept", "not cleaned yet"),
        "set_aside": ("kept", first),
    }
    return stopped[journey.outcome]


def _add_maker(figures: Figures, sample: Sample) -> None:
    parameters = {name: value for name, value in sample.parameters.items() if name != "seed"}
    maker = Maker(
        sample.origin,
        sample.model,
        sample.type,
        sample.template,
        sample.template_sha256,
        json.dumps(parameters, sort_keys=True, ensure_ascii=False),
    )
    if maker in figures.makers or len(figures.makers) < MOST_MAKERS:
        figures.makers[maker] += 1


def _add_reasons(figures: Figures, journey: Journey) -> None:
    counts = figures.rejections if journey.outcome == "rejected" else figures.set_asides
    figures.turns_set_aside.update(
        code for lost in journey.left_out if journey.kept for code in lost.reasons
    )
    for code in journey.reasons:
        counts[code, journey.request.type] += 1
        examples = figures.examples.setdefault(code, Reservoir(EXAMPLES, figures.seed))
        examples.add(journey.request.sample_id, journey)
