"""The lines of a run's files: requests, answers, and samples with a check of each claim."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

SampleType = Literal["conversation", "detail", "reasoning"]
"""LLaVA's three types (arXiv 2304.08485, section 3)."""

Kind = Literal[
    "existence", "count", "place", "object", "attribute", "action", "relation",
    "description", "reasoning", "cannot_tell",
]  # fmt: skip
"""What a question is about; `cannot_tell`: the right answer is that the image does not say."""

Verdict = Literal["supported", "contradicted", "unknown"]


Count = Annotated[int, Field(ge=0, le=10**15)]
Money = Annotated[float, Field(ge=0, le=1e15)]


class Line(BaseModel):
    """One line of JSON; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Shown(Line):
    """The annotations of an image that a request shows.

    Captions have the labels `c1`, `c2`, ... and boxes `b1`, `b2`, ... in this order; answers cite
    them.

    Attributes:
        captions: Annotation ids of the captions.
        boxes: Annotation ids of the boxes that were shown one by one.
        summarised: Annotation ids of boxes that are only counted (small ones, or more than the
            limit), by category.
        decimals: Digits of the boxes' corners, which are shares of the image's width and height.
    """

    captions: tuple[int, ...] = ()
    boxes: tuple[int, ...] = ()
    summarised: dict[str, tuple[int, ...]] = {}
    decimals: int = 2


class ImageSource(Line):
    """The image a sample is about; `license` is COCO's number, None where unknown."""

    id: int
    file_name: str
    width: int
    height: int
    license: int | None = None


class Constraint(Line):
    """A demand on the form of an answer that a program checks.

    Attributes:
        kind: IFEval's name, a key of `grow.constraints.KINDS`.
        arguments: IFEval's `kwargs`.
    """

    kind: str
    arguments: dict[str, Any] = {}


class Task(Line):
    """A question made from the annotations on purpose, answerable from the image or not.

    Attributes:
        why: How it was made, a key of `grow.refusals.UNANSWERABLE` or `LOOK_ALIKES`.
        subject: The category it is about.
        answer: The right answer, in one word; empty if there is none.
    """

    question: str
    answerable: bool
    why: str
    kind: Kind
    subject: str = ""
    answer: str = ""


class Grown(Line):
    """What a sample was grown from; a receipt has it.

    Attributes:
        operator: A key of `grow.operators.OPERATORS`.
        parents: Ids of the samples, or of seed tasks (`seed:12`), that the request shows.
        images: Of a conversation about several images, those after the first one.
        language: The language of a translation.
        constraints: What the instruction demands of the answer's form.
        tasks: The questions of `refuse`, in the order of the turns.
    """

    operator: str
    parents: tuple[str, ...] = ()
    images: tuple[ImageSource, ...] = ()
    language: str | None = None
    constraints: tuple[Constraint, ...] = ()
    tasks: tuple[Task, ...] = ()


class Request(Line):
    """One question to a teacher; `id` is the SHA-256 of everything that determines the answer.

    Attributes:
        id: Hex digest over everything below except `sample_id` and `grown`.
        sample_id: Unique in a run, `000000033471-detail-0`.
        image: COCO's image id.
        number: Which of several samples of one image and type, from 0.
        template: The prompt's name; its text (system, examples) is in `templates.json`.
        template_sha256: Digest of that text.
        question: The question, if it is ours (`detail`); None: the teacher writes it.
        context: The last user message: captions and boxes as text, and the task.
        parameters: Sampling parameters as sent, with `model`, all explicit.
        shown: The annotations in `context`.
        grown: What the sample is grown from, which `context` shows; None: from the image alone.
    """

    id: str
    sample_id: str
    image: int
    type: SampleType
    number: int
    template: str
    template_sha256: str
    question: str | None
    context: str
    parameters: dict[str, Any]
    shown: Shown
    grown: Grown | None = None


class Answer(Line):
    """A teacher's answer to one request, unchanged.

    Attributes:
        request: The request's id.
        teacher: Who answered.
        text: Unchanged.
        finish: The server's finish reason (`stop`, `length`, `content_filter`, ...).
        model: The server's name for it.
        fingerprint: The server's `system_fingerprint`.
        tokens_in: Of the prompt; `tokens_cached` of them at the cached price.
        usd: By the prices of the configuration; None without prices.
        attempts: Number of attempts, including the last one.
        seconds: From the start of the request to the last byte; left out of reproducible results.
    """

    request: str
    teacher: Literal["openai", "batch", "rules"]
    text: str
    finish: str | None = None
    model: str = ""
    fingerprint: str | None = None
    tokens_in: Count = 0
    tokens_cached: Count = 0
    tokens_out: Count = 0
    usd: Money | None = None
    attempts: Count = 1
    seconds: float = 0.0


class Failure(Line):
    """Why a request has no answer yet; the next start of the command asks it again.

    Attributes:
        request: The request's id.
        reason: `nothing_to_say` does not count as a fault: the rules find nothing certain to say
            about the image.
        message: One sentence, safe to print.
        status: The server's HTTP status, if there was one.
        attempts: Number of attempts.
    """

    request: str
    sample_id: str
    reason: Literal[
        "rate_limited", "server_error", "timeout", "connection", "too_long", "not_an_answer",
        "refused", "expired", "nothing_to_say",
    ]  # fmt: skip
    message: str
    status: int | None = None
    attempts: int = 0


class Turn(Line):
    """A question with its answer, and the labels (`c2`, `b1`) that support the answer."""

    question: str
    answer: str
    kind: Kind
    evidence: tuple[str, ...] = ()


@dataclass(slots=True)
class Check:
    """What was found about one claim, or about the form of a sample.

    Every sample has about ten, made by code that is checked, so that they are not models of their
    own; pydantic checks them where a sample is read.

    Attributes:
        rule: Which rule spoke, e.g. `object`, `count`, `side`, `leak`, `form`.
        verdict: What the annotations say of the claim; faults of form are `contradicted`.
        code: Why this rejects the sample, e.g. `OBJECT_NOT_FOUND`; None where it does not.
        turn: Index of the turn; None: the sample as a whole.
        part: In which text of the turn.
        span: Characters of that text, from and to.
        claim: In plain words, e.g. `two dogs`, `cat left of cup`.
        evidence: Annotation ids of the captions and boxes that decided.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    rule: str
    verdict: Verdict
    code: str | None = None
    turn: int | None = None
    part: Literal["question", "answer"] | None = None
    span: tuple[int, int] | None = None
    claim: str = ""
    evidence: tuple[int, ...] = ()


class Cost(Line):
    """The cost of a sample's answer."""

    tokens_in: Count = 0
    tokens_cached: Count = 0
    tokens_out: Count = 0
    usd: Money | None = None
    attempts: Count = 1


class Objection(Line):
    """A statement that the judge lists.

    Attributes:
        turn: Index of the turn whose answer makes it.
        statement: In the words of the answer, as the judge repeats them.
        verdict: `contradicted` by captions or boxes, or `unsupported`: they do not show it.
        reason: The judge's own.
    """

    turn: int
    statement: str
    verdict: Literal["unsupported", "contradicted"]
    reason: str = ""


class Judgment(Line):
    """What the judge (`verify.judge`) says about a sample.

    Attributes:
        request: Id of the request to the judge.
        verdict: The worst of the objections, `supported` without any. There is no verdict if the
            answer is `unreadable`, the judge or its server `refused`, or the request is
            `unanswered`.
        note: Why there is no verdict.
        model: As the server names itself.
        cost: What the judge's answer took; None if there is none.
        overruled: Codes of the rules that do not reject the sample, since the judge decides about
            the content instead of them.
    """

    request: str
    verdict: Literal[
        "supported", "unsupported", "contradicted", "unreadable", "refused", "unanswered"
    ]
    objections: tuple[Objection, ...] = ()
    note: str = ""
    model: str = ""
    cost: Cost | None = None
    overruled: tuple[str, ...] = ()

    def of_turns(self, numbers: Sequence[int]) -> "Judgment":
        """Return what is said about some of the turns, which get the numbers 0, 1, ..."""
        places = {number: place for place, number in enumerate(numbers)}
        objections = tuple(
            objection.model_copy(update={"turn": places[objection.turn]})
            for objection in self.objections
            if objection.turn in places
        )
        verdict = self.verdict if not self.objections else worst(objections)
        return self.model_copy(update={"objections": objections, "verdict": verdict})


def worst(
    objections: Sequence[Objection],
) -> Literal["supported", "unsupported", "contradicted"]:
    """Return the worst verdict among objections, `supported` if there are none."""
    verdicts = [objection.verdict for objection in objections]
    if "contradicted" in verdicts:
        return "contradicted"
    return "unsupported" if verdicts else "supported"


class Sample(Line):
    """A finished sample with its receipt; a line of `samples.jsonl` or `rejected.jsonl`.

    Attributes:
        origin: `llm`, `rules` (made by a program) or `imported`.
        turns: Empty where the answer could not be read.
        raw: The answer's text if `turns` is empty.
        shown, request, template, template_sha256, parameters, model, fingerprint, grown: As in
            `Request` and `Answer`.
        tool: Name and version of the program that made and checked it.
        judgment: The opinion of the judge; None without a judge, and if `turns` is empty.
        status: `accepted`, or `rejected` for the `reasons`: codes in the order found, each once.
    """

    schema_: Annotated[Literal["vlm_sft.sample/1"], Field(alias="schema")] = "vlm_sft.sample/1"
    id: str
    type: SampleType
    origin: Literal["llm", "rules", "imported"]
    image: ImageSource
    turns: tuple[Turn, ...]
    raw: str | None = None
    shown: Shown
    request: str
    template: str
    template_sha256: str
    model: str
    fingerprint: str | None = None
    parameters: dict[str, Any]
    cost: Cost
    tool: str
    checks: tuple[Check, ...] = ()
    judgment: Judgment | None = None
    status: Literal["accepted", "rejected"]
    reasons: tuple[str, ...] = ()
    grown: Grown | None = None

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """Return all images of the sample, in the order of its record."""
        return (self.image, *(self.grown.images if self.grown else ()))

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True,
        serialize_by_alias=True,
    )  # fmt: skip


class ConversationForm(Line):
    """Form of the JSON that a teacher answers with for `conversation` and `reasoning`."""

    turns: tuple[Turn, ...]


class DetailForm(Line):
    """Form of the JSON that a teacher answers with for `detail`, whose question is ours."""

    answer: str
    evidence: tuple[str, ...]


def answer_form(sample_type: SampleType) -> type[ConversationForm] | type[DetailForm]:
    """Return the form of a type's answers; servers get its `.model_json_schema()`."""
    return DetailForm if sample_type == "detail" else ConversationForm
