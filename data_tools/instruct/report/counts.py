"""Count the results of a run in one pass, in memory that does not grow with its samples."""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, Final, Generic, Literal, TypeVar, get_args

from data_tools.coco import AnnotatedImage
from data_tools.digests import hashed
from data_tools.instruct.clean.choices import VALUES, Categories, choice_of
from data_tools.instruct.report.outcomes import Outcomes
from data_tools.instruct.report.results import Outcome, Result
from data_tools.instruct.schema import Answer, Cost, Sample, SampleType, Verdict
from data_tools.instruct.verify.agreement import Agreement
from data_tools.instruct.verify.codes import NOT_CLAIMS

TYPES: Final[tuple[SampleType, ...]] = get_args(SampleType)

Step = Literal["planned", "answered", "read", "accepted", "kept"]

STEPS: Final[dict[Step, str]] = {
    "planned": "requests planned",
    "answered": "answered",
    "read": "parsed into turns",
    "accepted": "accepted by all checks",
    "kept": "kept after cleaning",
}
"""Steps of the funnel; the requests of each are a subset of those of the one before."""

EXAMPLES: Final = 5
"""Example samples per reason."""
GALLERY: Final = 20
"""Random samples per outcome."""
LONGEST: Final = 400
"""Words; longer texts are counted as this long."""
MAX_MAKERS: Final = 1000

Item = TypeVar("Item")


class Reservoir(Generic[Item]):
    """A random selection that depends on the items' keys, not on their order."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._heap: list[tuple[int, str, Item]] = []

    def add(self, key: str, item: Item) -> None:
        """Offer an item; keys are unique."""
        rank = -hashed(self._seed, key)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (rank, key, item))
        elif rank > self._heap[0][0]:
            heapq.heapreplace(self._heap, (rank, key, item))

    def items(self) -> list[Item]:
        """Return the selected items in a random but fixed order."""
        return [item for _, _, item in sorted(self._heap, key=lambda entry: -entry[0])]


@dataclass
class Usage:
    """Tokens and money that answers cost; `unpriced` answers have no price in `usd`."""

    answers: int = 0
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    unpriced: int = 0

    def add(self, cost: Cost | Answer) -> None:
        """Add one answer."""
        self.answers += 1
        self.tokens_in += cost.tokens_in
        self.tokens_cached += cost.tokens_cached
        self.tokens_out += cost.tokens_out
        self.usd += cost.usd or 0.0
        self.unpriced += cost.usd is None

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def is_priced(self) -> bool:
        """Whether any answer has a price."""
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
class SampleCounts:
    """Counts over the samples to be trained on.

    Attributes:
        images: Images with a sample, by license (COCO's number).
        covered: Images with a sample, by the categories annotated in them.
        cited: Samples with a claim that was checked against a box of the category.
        words: Texts by type, part and number of words.
        kinds: Turns by kind of question.
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
    yes_no: Counter[tuple[str, str]] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)

    def add(self, sample: Sample, image: AnnotatedImage | None) -> None:
        """Count one sample."""
        self.samples += 1
        self.origins[sample.origin] += 1
        if sample.image.id not in self.seen:
            self.covered.update(image.categories if image else ())
        for one in sample.images:
            if one.id not in self.seen:
                self.seen.add(one.id)
                self.images[one.license] += 1
        cited = {number for check in sample.checks for number in check.evidence}
        self.cited.update({box.category for box in image.boxes if box.id in cited} if image else ())
        for turn in sample.turns:
            self.kinds[turn.kind] += 1
            for part, text in (("question", turn.question), ("answer", turn.answer)):
                self.words[sample.type, part, min(len(text.split()), LONGEST)] += 1
            choice = choice_of(turn)
            if choice is not None and choice.family == "yes_no":
                value = VALUES["yes_no"][choice.value]
                named = self.categories.named(turn.question)
                self.yes_no.update((name, value) for name in named)


@dataclass
class RunCounts:
    """All counts of a report.

    Attributes:
        good_outcome: Outcome of the samples to be trained on: `kept` once cleaning has run.
        good: Counts over these samples.
        images: Images in the index.
        annotated: Images by annotated category.
        ends: The outcomes of the images and requests.
        steps: Requests by type and step reached.
        outcomes: Requests by outcome.
        lost: Requests by the step they did not reach and the first reason.
        rejected, dropped: Samples by code and type; a sample may have several codes.
        dropped_turns: Turns dropped from samples that were kept, by code.
        claims: Checks of claims about the image, by rule and verdict, over all verified samples.
        claims_by_type: The same checks by type of sample and verdict.
        other_checks: Checks of form, style and citations, by rule and verdict.
        agreement: Samples by the verdicts of the rules and of the judge, if there is one.
        usage: Cost of all answers by type, including those of rejected samples.
        examples: Samples by the code for which they were rejected or dropped.
        gallery: Samples by outcome.
    """

    seed: int
    good_outcome: Literal["kept", "accepted"]
    good: SampleCounts
    images: int = 0
    annotated: Counter[str] = field(default_factory=Counter)
    ends: Outcomes = field(default_factory=Outcomes)
    steps: Counter[tuple[SampleType, Step]] = field(default_factory=Counter)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    lost: Counter[tuple[Step, str]] = field(default_factory=Counter)
    rejected: Counter[tuple[str, SampleType]] = field(default_factory=Counter)
    dropped: Counter[tuple[str, SampleType]] = field(default_factory=Counter)
    dropped_turns: Counter[str] = field(default_factory=Counter)
    claims: Counter[tuple[str, Verdict]] = field(default_factory=Counter)
    claims_by_type: Counter[tuple[str, Verdict]] = field(default_factory=Counter)
    other_checks: Counter[tuple[str, Verdict]] = field(default_factory=Counter)
    agreement: Agreement = field(default_factory=Agreement)
    usage: defaultdict[SampleType, Usage] = field(default_factory=lambda: defaultdict(Usage))
    makers: Counter[Maker] = field(default_factory=Counter)
    examples: dict[str, Reservoir[Result]] = field(default_factory=dict)
    gallery: dict[Outcome, Reservoir[Result]] = field(default_factory=dict)

    def step(self, name: Step) -> int:
        """Return the number of requests that reached a step."""
        return sum(self.steps[sample_type, name] for sample_type in TYPES)

    @property
    def asked(self) -> int:
        """Number of images with a request."""
        return self.ends.num_images

    @property
    def total_usage(self) -> Usage:
        """Usage over all types."""
        return sum(self.usage.values(), Usage())

    def add(self, result: Result, image: AnnotatedImage | None) -> None:
        """Count one request."""
        request, sample, outcome = result.request, result.sample, result.outcome
        reached = _steps(result)
        self.outcomes[outcome] += 1
        self.ends.add(result)
        self.steps.update((request.type, step) for step in reached)
        if outcome != "kept":
            self.lost[list(STEPS)[len(reached)], _reason(result)] += 1
        if result.answer is not None:
            self.usage[request.type].add(result.answer)
        if sample is None:
            return
        self.usage[sample.type].add(sample.cost)
        self._add_maker(sample)
        self._add_reasons(result)
        self.agreement.add(sample)
        for check in sample.checks:
            if check.rule in NOT_CLAIMS:
                self.other_checks[check.rule, check.verdict] += 1
                continue
            self.claims[check.rule, check.verdict] += 1
            self.claims_by_type[sample.type, check.verdict] += 1
        self.gallery.setdefault(outcome, Reservoir(GALLERY, self.seed)).add(sample.id, result)
        if outcome == self.good_outcome:
            self.good.add(result.kept or sample, image)

    def _add_maker(self, sample: Sample) -> None:
        parameters = {name: value for name, value in sample.parameters.items() if name != "seed"}
        maker = Maker(
            sample.origin,
            sample.model,
            sample.type,
            sample.template,
            sample.template_sha256,
            json.dumps(parameters, sort_keys=True, ensure_ascii=False),
        )
        if maker in self.makers or len(self.makers) < MAX_MAKERS:
            self.makers[maker] += 1

    def _add_reasons(self, result: Result) -> None:
        if result.kept:
            self.dropped_turns.update(code for lost in result.dropped for code in lost.reasons)
        counts = self.rejected if result.outcome == "rejected" else self.dropped
        for code in result.reasons:
            counts[code, result.request.type] += 1
            examples = self.examples.setdefault(code, Reservoir(EXAMPLES, self.seed))
            examples.add(result.request.sample_id, result)


def count_results(
    results: Iterable[Result],
    images: Mapping[int, AnnotatedImage],
    *,
    seed: int,
    good_outcome: Literal["kept", "accepted"],
) -> RunCounts:
    """Count requests and their results.

    Args:
        results: In any order; the counts do not depend on it.
        images: The index.
        seed: Seed of the random selection of examples.
        good_outcome: Outcome of the samples to be trained on.
    """
    annotated = Counter(name for image in images.values() for name in image.categories)
    good = SampleCounts(Categories(annotated))
    counts = RunCounts(seed, good_outcome, good, images=len(images), annotated=annotated)
    for result in results:
        counts.add(result, images.get(result.request.image))
    return counts


def by_count(counts: Mapping[Any, int]) -> list[tuple[Any, int]]:
    """Return the entries, the largest count first, equal ones in alphabetical order."""
    return sorted(counts.items(), key=lambda entry: (-entry[1], str(entry[0])))


def sum_by_first(counts: Mapping[tuple[str, Any], int]) -> Counter[str]:
    """Return the sums of counts over all but the first part of their keys."""
    total: Counter[str] = Counter()
    for (name, _), count in counts.items():
        total[name] += count
    return total


def _steps(result: Result) -> list[Step]:
    """Return the steps that a request reached."""
    steps: list[Step] = ["planned"]
    if result.outcome != "unanswered":
        steps.append("answered")
    if result.sample is not None and result.sample.turns:
        steps.append("read")
    if result.outcome in ("accepted", "dropped", "kept"):
        steps.append("accepted")
    if result.outcome == "kept":
        steps.append("kept")
    return steps


def _reason(result: Result) -> str:
    """Return why a request did not reach the next step."""
    missing: dict[Outcome, str] = {
        "unanswered": "not asked yet",
        "unverified": "not verified yet",
        "accepted": "not cleaned yet",
    }
    return next(iter(result.reasons), missing.get(result.outcome, "no reason given"))
