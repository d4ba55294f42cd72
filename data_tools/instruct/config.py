"""What one run of `data_tools.instruct` is told: its YAML file."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_tools import geometry
from data_tools.instruct.schema import SampleType
from vlm_sft.config.fields import NonEmptyText
from vlm_sft.config.loading import Section

Share = Annotated[float, Field(ge=0, le=1)]


class CocoConfig(Section):
    """COCO's annotation files, 2014 or 2017, and the folder of the images."""

    instances: NonEmptyText | None = None
    captions: NonEmptyText | None = None
    images: NonEmptyText
    follow_symlinks: bool = False
    """Whether images may be symbolic links to a place outside of `images`."""
    max_faulty: Share = 0.01
    """Share of the boxes, captions or images that one kind of fault may set aside; beyond, the
    files are taken for wrong ones. 1 where only part of the annotated images is on the disk."""


class GuardConfig(Section):
    """Images that evaluations use are not trained on."""

    lists: dict[str, NonEmptyText | list[NonEmptyText]] = Field(default={})
    """Files with the image ids of evaluations, by name: the known ones (`pope`,
    `llava_bench_coco`, `karpathy_test`, `val2014`, `val2017`), and the user's own by any name."""
    allow_evaluation_images: bool = False
    """Train on them all the same; what is measured on them afterwards is void."""


class ImagesConfig(Section):
    """Which images are asked about."""

    count: PositiveInt | None = None
    """None: all."""
    choose: Literal["random", "balanced"] = "balanced"
    """`balanced`: every category gets its images in turn, the rarest first, in the spirit of
    LLaVA's balancing of noun phrases (arXiv 2304.08485, appendix E)."""


class RequestsConfig(Section):
    """What is asked, and what of an image is shown."""

    shares: dict[SampleType, Annotated[float, Field(ge=0)]] = Field(
        default={"conversation": 0.70, "detail": 0.29, "reasoning": 0.94}
    )
    """Requests an image of each type; a fraction asks for that share of the images. LLaVA's own:
    56,681, 23,240 and 76,643 samples of 81,479 images."""
    prompts: NonEmptyText | None = None
    """Folder with own prompts and seed examples; None: those of `data_tools/instruct/prompts`."""
    decimals: Annotated[int, Field(ge=1, le=4)] = 2
    max_boxes: PositiveInt = 30
    """Beyond, the smallest are told as a number."""
    min_area: Share = 0.002
    """Boxes below this share of the image are told as a number."""


class PricesConfig(Section):
    """US dollars for a million tokens."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]
    cached: Annotated[float, Field(ge=0)] | None = None
    """None: as `input`."""


class TeacherConfig(Section):
    """Who writes the answers."""

    kind: Literal["openai", "batch", "rules"]
    model: str = ""
    base_url: str | list[str] | None = None
    """Of an OpenAI-compatible server, ending in `/v1`; plain http on this machine only. Of several
    servers with the same model each request has one, and the next one after a failure."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; the key itself is never written anywhere."""
    answers_dir: NonEmptyText | None = None
    """A folder of answers that runs share; None: `answers` in the run's own."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: PositiveInt = 1024
    structured: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """How the server is held to JSON; `auto` asks it once."""
    concurrency: PositiveInt = 16
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    attempts: PositiveInt = 5
    """Sendings of one request in one start of the command."""
    backoff_seconds: PositiveFloat = 1.0
    """Wait before the second attempt, doubled before each further one, where the server names no
    time of its own."""
    timeout_seconds: PositiveFloat = 120.0
    """From sending a request to the last byte of its answer."""
    max_answer_bytes: PositiveInt = 1 << 22
    """Longer responses are cut off and count as failures."""
    failures_allowed: Share = 0.0
    """More requests without an answer than this share end the command with exit code 3."""
    batch_size: Annotated[int, Field(ge=1, le=50_000)] = 10_000
    """`batch`: requests of one batch."""
    poll_seconds: PositiveFloat = 30.0
    """`batch`: between two looks at the batches."""
    prices: PricesConfig | None = None

    @model_validator(mode="after")
    def _no_key(self) -> Self:
        # On the whole section, for errors of one field print its value, which may be the key.
        name = self.api_key_env
        looks_random = len(name) >= 20 and re.search("[a-z]", name) and re.search("[0-9]", name)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name) or looks_random:
            raise ValueError(
                "api_key_env is no name of an environment variable (not shown here, for it may be "
                "the key itself); put the key into a variable and give its name"
            )
        return self


class LimitsConfig(Section):
    """What a run may spend, over all of its starts; None: no limit."""

    requests: PositiveInt | None = None
    tokens: PositiveInt | None = None
    usd: PositiveFloat | None = None


class TurnsConfig(Section):
    """How many turns a sample has, and how long its texts are, in words."""

    turns: tuple[PositiveInt, PositiveInt]
    answer_words: tuple[PositiveInt, PositiveInt]


class VerifyConfig(Section):
    """How strict the checks are; docs/instruction-data/verification.md tells what each one sees."""

    forms: dict[SampleType, TurnsConfig] = Field(
        default={
            "conversation": TurnsConfig(turns=(1, 20), answer_words=(1, 150)),
            "detail": TurnsConfig(turns=(1, 1), answer_words=(5, 400)),
            "reasoning": TurnsConfig(turns=(1, 1), answer_words=(5, 500)),
        }
    )
    max_question_words: PositiveInt = 80
    """Of any question."""
    max_hedged: Share = 0.25
    """Of a description's or conversation's sentences; reasoning may guess."""
    all_yes_from: PositiveInt = 3
    """So many yes/no questions, all answered yes, reject a conversation."""
    unseen_objects: Literal["reject", "keep"] = "reject"
    """Things in neither boxes nor captions, in descriptions and conversations; in reasoning they
    are refused where they are said to be visible."""
    under_labelled: list[str] = Field(
        default=["person", "car", "chair", "dining table", "cup", "book"]
    )
    """Categories that COCO often leaves without a box: an unseen one counts as unknown, not as
    contradicted (RePOPE, arXiv 2504.15707); `unseen_objects` decides about it all the same."""
    uncertain_counts: Literal["reject", "keep"] = "reject"
    """`How many` of what the annotations cannot count."""
    unknown_attributes: Literal["reject", "keep"] = "keep"
    """Colours, materials and actions that no caption has."""
    countable: PositiveInt = 8
    """More boxes of one category than this are not counted: annotators stop there."""
    tiny: Share = 0.002
    """Boxes below this share of the image may or may not be counted."""
    gap: Share = geometry.GAP
    """Share of the side that must lie between two boxes, or a box and the middle, for a side to be
    certain."""
    centres: Share = geometry.CENTERS
    """Where boxes overlap in one direction: share of the side that their centres must differ by."""
    far: Share = geometry.FAR
    """A gap of this share of the side between two boxes refutes that one is on, in or next to the
    other."""


class NearDuplicatesConfig(Section):
    """Texts that say the same in nearly the same words."""

    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Jaccard similarity of the word shingles from which the later of two texts is set aside."""
    shingle_words: Annotated[int, Field(ge=1, le=16)] = 3
    across_origins: list[Literal["llm", "rules", "imported"]] = Field(default=["llm", "imported"])
    """Whose texts are compared across images. A program's sentences repeat by nature, and what
    differs is the image: they are compared with samples on the same image only."""
    across_words: PositiveInt = 20
    """Texts with fewer words are compared with samples on the same image only."""


class SameImageConfig(Section):
    """Images that look the same."""

    action: Literal["set_aside", "keep"] = "set_aside"
    """`set_aside`: samples on the later image; `keep` opens no image."""
    max_distance: Annotated[int, Field(ge=0, le=16)] = 6
    """Bits of 64 by which the perceptual hashes of candidates may differ."""
    max_difference: Annotated[float, Field(ge=0, le=255)] = 10.0
    """Mean difference of 16 x 16 colour thumbnails, of 255 and apart from their brightness, up to
    which candidates are the same; a perceptual hash alone sees no colour."""
    workers: PositiveInt = 1
    """Processes that open images; the result is the same for any number."""


class AnswerBalanceConfig(Section):
    """Equal numbers of the answers that a guesser could choose among."""

    families: list[Literal["yes_no", "side", "height", "option"]] = Field(
        default=["yes_no", "side", "height", "option"]
    )
    ratio: Annotated[float, Field(ge=1)] = 1.0
    """The commoner answer may be so many times the rarer, for each category that questions name,
    for each kind of question and over all."""
    slack: Annotated[int, Field(ge=0)] = 1
    """Turns above that which are let be; 0 leaves no category with one answer alone."""


class OpeningsConfig(Section):
    """Answers that all begin alike."""

    max_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Of a type's answers, the share that may begin with the same three words."""
    min_words: Annotated[int, Field(ge=3)] = 8
    """Shorter answers are not counted: their form is given by the question."""
    least: PositiveInt = 20
    """So many of one opening are always let be."""
    max_loss: Share = 0.2
    """Where the share would cost more than this part of a type's answers, none is taken and that is
    said: the cure for such monotony is another prompt."""


class CleanConfig(Section):
    """What is taken out of the accepted samples; None or an empty list leaves a step out."""

    near_duplicates: NearDuplicatesConfig | None = NearDuplicatesConfig()
    same_questions: bool = True
    """Whether a question that was asked of the same image before is set aside."""
    same_images: SameImageConfig = SameImageConfig()
    answers: AnswerBalanceConfig = AnswerBalanceConfig()
    openings: OpeningsConfig | None = OpeningsConfig()
    max_per_image: PositiveInt | None = None
    max_per_category: PositiveInt | None = None
    """Samples a category brings in, the rarest category first, as LLaVA chose captions by noun
    phrases (arXiv 2304.08485, appendix)."""
    type_shares: dict[SampleType, Annotated[float, Field(ge=0)]] | None = None
    """Proportions of the kept samples by type, reached by setting aside; None: as they come."""


class ExportConfig(Section):
    """Which files are written."""

    formats: Annotated[list[Literal["llava", "messages", "parquet"]], Field(min_length=1)] = Field(
        default=["llava", "messages", "parquet"]
    )
    image_prefix: str = ""
    """Put before every image's name, e.g. `coco/train2017/`; the trainer's `image_root` is then
    the folder above."""


class InstructConfig(Section):
    """The whole file."""

    output_dir: NonEmptyText
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    coco: CocoConfig
    guard: GuardConfig = GuardConfig()
    images: ImagesConfig = ImagesConfig()
    requests: RequestsConfig = RequestsConfig()
    teacher: TeacherConfig
    limits: LimitsConfig = LimitsConfig()
    verify: VerifyConfig = VerifyConfig()
    clean: CleanConfig = CleanConfig()
    export: ExportConfig = ExportConfig()
