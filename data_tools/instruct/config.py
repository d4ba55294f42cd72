"""The configuration of a run of `data_tools.instruct`: the schema of its YAML file."""

import re
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from data_tools import geometry
from data_tools.instruct.schema import SampleType
from vlm_sft.config.fields import NonEmptyText
from vlm_sft.config.loading import Section

Share = Annotated[float, Field(ge=0, le=1)]


class CocoConfig(Section):
    """COCO annotation files (2014 or 2017) and the directory of the images."""

    instances: NonEmptyText | None = None
    """File with the boxes, `instances_*.json`. Without it, only captions are known."""
    captions: NonEmptyText | None = None
    """File with the captions, `captions_*.json`. Without it, only boxes are known."""
    images: NonEmptyText
    """Directory that the file names of the images start from."""
    follow_symlinks: bool = False
    """Whether images may be symbolic links to files outside of `images`."""
    max_faulty: Share = 0.01
    """Largest share of the boxes, captions or images that may be dropped for one kind of fault. If
    there are more, the run stops, since the files are probably the wrong ones. Set it to 1 if you
    have only a part of the annotated images."""


class GuardConfig(Section):
    """Keeps images that evaluations use out of the training data."""

    lists: dict[str, NonEmptyText | list[NonEmptyText]] = Field(default={})
    """Files with the image ids of evaluations, by name: `pope`, `llava_bench_coco`,
    `karpathy_test`, `val2014`, `val2017`, or any other name for lists of your own."""
    allow_evaluation_images: bool = False
    """Train on images that evaluations use. Results of these evaluations are then meaningless."""


class ImagesConfig(Section):
    """The choice of images."""

    count: PositiveInt | None = None
    """Number of images to ask about. Null: all."""
    choose: Literal["random", "balanced"] = "balanced"
    """`balanced`: the categories take turns in choosing an image, the rarest one first, similar to
    LLaVA's balancing of noun phrases (arXiv 2304.08485, appendix E). `random`: all images are
    equally likely."""


class RequestsConfig(Section):
    """The requests: their types, and what they show of an image."""

    shares: dict[SampleType, Annotated[float, Field(ge=0)]] = Field(
        default={"conversation": 0.70, "detail": 0.29, "reasoning": 0.94}
    )
    """Requests per image, by type; 0.7 asks about 70 % of the images. The defaults are LLaVA's:
    56,681, 23,240 and 76,643 samples of 81,479 images."""
    prompts: NonEmptyText | None = None
    """Directory with your own prompts and examples. Null: `data_tools/instruct/prompts`."""
    decimals: Annotated[int, Field(ge=1, le=4)] = 2
    """Decimals of the box coordinates, which are shares of the image's width and height."""
    max_boxes: PositiveInt = 30
    """Boxes shown per image. If there are more, the smallest ones are only counted."""
    min_area: Share = 0.002
    """Boxes with a smaller share of the image's area are only counted."""


class PricesConfig(Section):
    """Prices in US dollars per million tokens."""

    input: Annotated[float, Field(ge=0)]
    """Price of prompt tokens."""
    output: Annotated[float, Field(ge=0)]
    """Price of generated tokens."""
    cached: Annotated[float, Field(ge=0)] | None = None
    """Price of prompt tokens that the server has cached. Null: as `input`."""


class TeacherConfig(Section):
    """The model that writes the answers."""

    section: ClassVar[str] = "teacher"
    """Where these settings are, for messages."""

    kind: Literal["openai", "batch", "rules"]
    """`openai`: a server with the OpenAI API. `batch`: the batch API of such a server. `rules`:
    sentences made from the annotations by a program, without a server."""
    model: str = ""
    """Name of the model on the server."""
    base_url: str | list[str] | None = None
    """URL of the server, ending in `/v1`; plain http is allowed to this machine only. With a list
    of servers that serve the same model, a request is sent to one of them, and to the next one
    after a failure. Null: OpenAI."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable with the API key. The key itself is never written."""
    answers_dir: NonEmptyText | None = None
    """Directory of answers that several runs share. Null: `answers` in `output_dir`."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling."""
    max_tokens: PositiveInt = 1024
    """Most tokens of an answer."""
    structured: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """How the server is made to answer in JSON. `auto` tries out once what the server supports."""
    concurrency: PositiveInt = 16
    """Requests that are sent at the same time."""
    requests_per_minute: PositiveInt | None = None
    """Rate limit of your account. Null: none."""
    tokens_per_minute: PositiveInt | None = None
    """Rate limit of your account, for prompt and answer together. Null: none."""
    attempts: PositiveInt = 5
    """How often a request is tried before it counts as failed."""
    backoff_seconds: PositiveFloat = 1.0
    """Wait before the second attempt if the server names no time; doubled for each further one."""
    timeout_seconds: PositiveFloat = 120.0
    """Time limit from sending a request to the last byte of the answer."""
    max_answer_bytes: PositiveInt = 1 << 22
    """Longer responses are not read to the end and count as failures."""
    failures_allowed: Share = 0.05
    """Share of the requests that may fail. If more do, `generate` ends with exit code 3 and `run`
    stops there; otherwise they continue with a warning. The next start repeats failed requests."""
    batch_size: Annotated[int, Field(ge=1, le=50_000)] = 10_000
    """Requests in one batch, with `kind: batch`."""
    poll_seconds: PositiveFloat = 30.0
    """How often the state of the batches is queried, with `kind: batch`."""
    prices: PricesConfig | None = None
    """Prices for the estimate of `plan` and for `limits.usd`."""

    @model_validator(mode="after")
    def _no_key(self) -> Self:
        # On the whole section, for errors of one field print its value, which may be the key.
        name = self.api_key_env
        looks_random = len(name) >= 20 and re.search("[a-z]", name) and re.search("[0-9]", name)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name) or looks_random:
            raise ValueError(
                "api_key_env is not the name of an environment variable (not shown here, since it "
                "may be the key itself); put the key into a variable and give its name"
            )
        return self


class JudgeConfig(TeacherConfig):
    """A text model that reads every sample next to the captions and boxes of its image.

    It has the settings of a teacher; what it costs counts towards `limits`.
    """

    section: ClassVar[str] = "verify.judge"

    kind: Literal["openai", "batch"] = "openai"
    """`openai`: a server with the OpenAI API. `batch`: the batch API of such a server."""
    answers_dir: None = None
    """Always null: the answers are recorded in `judge/answers` in `output_dir`."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Sampling temperature."""
    failures_allowed: Share = 0.05
    """Share of the requests that may fail. If more do and `decides` is not false, `verify` ends
    with exit code 3 after writing its files; otherwise it continues with a warning. The next start
    repeats failed requests."""
    prices: PricesConfig | None = None
    """Prices for `limits.usd`, which applies to teacher and judge together."""
    decides: bool | Literal["contradicted", "instead"] = False
    """What rejects a sample, besides the rules. `contradicted`: a statement that the judge lists as
    contradicted, or a missing verdict. `instead`: the same, and what the rules find about the
    content rejects nothing where there is a verdict. `true`: what `contradicted` rejects, and
    statements that the judge lists as unsupported, which many true answers have. `false`: nothing;
    verdicts are stored and counted next to those of the rules."""
    prompt: NonEmptyText | None = None
    """File with your own system text. Null: `data_tools/instruct/prompts/judge.txt`."""


class LimitsConfig(Section):
    """Limits of a run, over all of its starts."""

    requests: PositiveInt | None = None
    """Most requests that are sent, repeated attempts included. Null: no limit."""
    tokens: PositiveInt | None = None
    """Most tokens, of prompts and answers. Null: no limit."""
    usd: PositiveFloat | None = None
    """Most US dollars; needs `teacher.prices`. Null: no limit."""


class TurnsConfig(Section):
    """The form of a type of samples."""

    turns: tuple[PositiveInt, PositiveInt]
    """Least and most number of turns."""
    answer_words: tuple[PositiveInt, PositiveInt]
    """Least and most number of words of an answer."""


FORMS: Final[dict[SampleType, TurnsConfig]] = {
    "conversation": TurnsConfig(turns=(1, 20), answer_words=(1, 150)),
    "detail": TurnsConfig(turns=(1, 1), answer_words=(5, 400)),
    "reasoning": TurnsConfig(turns=(1, 1), answer_words=(5, 500)),
}


class VerifyConfig(Section):
    """Strictness of the checks, which docs/instruction-data/verification.md describes."""

    forms: dict[SampleType, TurnsConfig] = Field(default=FORMS)
    """Accepted numbers of turns and words, by type. Types that are not given keep the default."""
    max_question_words: PositiveInt = 80
    """Longer questions reject a sample."""
    max_hedged: Share = 0.35
    """Largest share of hedged sentences ("probably", "it seems") in a description or conversation.
    Reasoning may hedge."""
    all_yes_from: PositiveInt = 3
    """A conversation is rejected if it has at least this many yes/no questions and all answers are
    yes."""
    unseen_objects: Literal["reject", "keep"] = "reject"
    """What to do about objects in neither boxes nor captions. In reasoning this concerns only
    objects that are said to be visible."""
    under_labelled: list[str] = Field(
        default=["person", "car", "chair", "dining table", "cup", "book"]
    )
    """Categories that COCO often leaves without a box. Such an object counts as unknown instead of
    contradicted (RePOPE, arXiv 2504.15707); `unseen_objects` still applies."""
    uncertain_counts: Literal["reject", "keep"] = "reject"
    """What to do about numbers that the annotations can neither confirm nor contradict."""
    unknown_attributes: Literal["reject", "keep"] = "keep"
    """What to do about colors, materials and actions that no caption mentions."""
    countable: PositiveInt = 8
    """Categories with more boxes than this are not counted, since annotators stop there."""
    tiny: Share = 0.002
    """Boxes with a smaller share of the image's area may be counted or not."""
    gap: Share = geometry.GAP
    """A side is certain if there is at least this share of the image's side between two boxes, or
    between a box and the middle."""
    centres: Share = geometry.CENTERS
    """If two boxes overlap in a direction, their order is certain if their centers differ by this
    share of the image's side."""
    far: Share = geometry.FAR
    """A gap of this share of the image's side between two boxes contradicts that one is on, in or
    next to the other."""
    judge: JudgeConfig | None = None
    """A text model as a second opinion. Null: no model is used and nothing is sent."""

    @field_validator("forms")
    @classmethod
    def _complete(cls, forms: dict[SampleType, TurnsConfig]) -> dict[SampleType, TurnsConfig]:
        return {**FORMS, **forms}


class NearDuplicatesConfig(Section):
    """Removal of texts that are nearly the same."""

    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Jaccard similarity of word shingles from which the later of two texts is dropped."""
    shingle_words: Annotated[int, Field(ge=1, le=16)] = 3
    """Words per shingle."""
    across_origins: list[Literal["llm", "rules", "imported"]] = Field(default=["llm", "imported"])
    """Origins of the texts that are compared across images. Sentences made by rules repeat by
    design and differ in their image, so they are compared within one image only."""
    across_words: PositiveInt = 20
    """Texts with fewer words are compared within one image only."""


class SameImageConfig(Section):
    """Removal of images that look the same."""

    action: Literal["drop", "keep"] = "drop"
    """`drop`: drop the samples on the later of two images. `keep`: open no images."""
    max_distance: Annotated[int, Field(ge=0, le=16)] = 6
    """Largest number of bits, of 64, in which the perceptual hashes of two candidates differ."""
    max_difference: Annotated[float, Field(ge=0, le=255)] = 10.0
    """Largest mean difference, of 255, between color thumbnails of 16 x 16 pixels with the same
    brightness, since a perceptual hash does not see colors."""
    workers: PositiveInt = 1
    """Processes that open images; has no influence on the result."""


class AnswerBalanceConfig(Section):
    """Balance between the answers to questions that can be guessed."""

    families: list[Literal["yes_no", "side", "height", "option"]] = Field(
        default=["yes_no", "side", "height", "option"]
    )
    """Kinds of questions to balance. An empty list disables this step."""
    ratio: Annotated[float, Field(ge=1)] = 1.0
    """Largest ratio between the more frequent and the less frequent answer, for each category in
    the questions, for each kind of question, and in total."""
    slack: Annotated[int, Field(ge=0)] = 1
    """Additional turns that are allowed above that ratio. With 0, a category whose questions all
    have the same answer loses all of them."""


class OpeningsConfig(Section):
    """Limit on answers that begin with the same words."""

    max_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Largest share of a type's answers that may begin with the same three words."""
    min_words: Annotated[int, Field(ge=3)] = 8
    """Shorter answers are not counted, since the question determines how they begin."""
    least: PositiveInt = 20
    """Number of answers with the same beginning that is always kept."""
    max_loss: Share = 0.2
    """If more than this share of a type's answers would be dropped, none is dropped and a warning
    recommends another prompt."""


class CleanConfig(Section):
    """What `clean` drops from the accepted samples."""

    decisions: NonEmptyText | None = None
    """Folder of the decisions of `data review`, e.g. `review` in `output_dir`: rejected samples are
    dropped, edited ones verified again, and accepted ones that `verify` had rejected are taken.
    Null: none are read."""
    near_duplicates: NearDuplicatesConfig | None = NearDuplicatesConfig()
    """Texts that are nearly the same. Null: keep them."""
    same_questions: bool = True
    """Whether to drop questions that were already asked about the same image."""
    same_images: SameImageConfig = SameImageConfig()
    """Images that look the same."""
    answers: AnswerBalanceConfig = AnswerBalanceConfig()
    """Balance of the answers."""
    openings: OpeningsConfig | None = OpeningsConfig()
    """Answers that begin alike. Null: keep them."""
    max_per_image: PositiveInt | None = None
    """Most samples of one image. Null: no limit."""
    max_per_category: PositiveInt | None = None
    """Most samples that a category contributes; the rarest category comes first, as in LLaVA's
    choice of captions by noun phrases (arXiv 2304.08485, appendix). Null: no limit."""
    type_shares: dict[SampleType, Annotated[float, Field(ge=0)]] | None = None
    """Proportions of the types in the result, reached by dropping samples. Null: no change."""


class ExportConfig(Section):
    """The training files."""

    formats: Annotated[list[Literal["llava", "messages", "parquet"]], Field(min_length=1)] = Field(
        default=["llava", "messages", "parquet"]
    )
    """Formats to write; every file has the same records."""
    image_prefix: str = ""
    """Text before the file name of each image, e.g. `coco/train2017/`. The trainer's `image_root`
    is then the directory that contains it."""


class InstructConfig(Section):
    """The configuration of a run."""

    output_dir: NonEmptyText
    """Directory of the run, with the files of all stages."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of every random choice."""
    coco: CocoConfig
    guard: GuardConfig = GuardConfig()
    images: ImagesConfig = ImagesConfig()
    requests: RequestsConfig = RequestsConfig()
    teacher: TeacherConfig
    limits: LimitsConfig = LimitsConfig()
    verify: VerifyConfig = VerifyConfig()
    clean: CleanConfig = CleanConfig()
    export: ExportConfig = ExportConfig()
