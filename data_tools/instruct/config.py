"""What one run of `data_tools.instruct` is told: its YAML file."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from data_tools.instruct.schema import SampleType
from vlm_sft.settings import Section

Share = Annotated[float, Field(ge=0, le=1)]


class CocoConfig(Section):
    """COCO's annotation files, 2014 or 2017, and the folder of the pictures."""

    instances: str | None = None
    captions: str | None = None
    images: str


class GuardConfig(Section):
    """Pictures that evaluations use are not trained on."""

    lists: list[str] = Field(default=[])
    """Files with image ids of the user's own evaluations."""
    allow_evaluation_images: bool = False


class PicturesConfig(Section):
    """Which pictures are asked about."""

    count: PositiveInt | None = None
    """None: all."""
    choose: Literal["random", "balanced"] = "balanced"
    """`balanced`: pictures with rare categories first, as LLaVA balanced its noun phrases."""


class RequestsConfig(Section):
    """What is asked, and what of a picture is shown."""

    shares: dict[SampleType, Annotated[float, Field(ge=0)]] = Field(
        default={"conversation": 1.0, "detail": 0.41, "reasoning": 1.0}
    )
    """Requests a picture of each type; a fraction asks for that share of the pictures."""
    decimals: Annotated[int, Field(ge=1, le=4)] = 2
    max_boxes: PositiveInt = 30
    """Beyond, the smallest are told as a number."""
    min_area: Share = 0.002
    """Boxes below this share of the picture are told as a number."""


class PricesConfig(Section):
    """US dollars for a million tokens."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]
    cached: Annotated[float, Field(ge=0)] | None = None
    """None: as `input`."""


class TeacherConfig(Section):
    """Who writes the answers."""

    kind: Literal["openai", "batch", "rules", "replay"]
    model: str = ""
    base_url: str | None = None
    """Of an OpenAI-compatible server, ending in `/v1`; plain http on this machine only."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; the key itself is never written anywhere."""
    replay_from: str | None = None
    """`replay`: a folder of recorded answers."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: PositiveInt = 1024
    structured: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """How the server is held to JSON; `auto` asks it once."""
    concurrency: PositiveInt = 16
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    attempts: PositiveInt = 5
    timeout_seconds: PositiveFloat = 120.0
    prices: PricesConfig | None = None


class LimitsConfig(Section):
    """What a run may spend, over all of its starts; None: no limit."""

    requests: PositiveInt | None = None
    tokens: PositiveInt | None = None
    usd: PositiveFloat | None = None


class VerifyConfig(Section):
    """How strict the checks are."""


class NearDuplicatesConfig(Section):
    """Texts that say the same in nearly the same words."""

    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Jaccard similarity of the word shingles from which the later of two texts is set aside."""
    shingle_words: Annotated[int, Field(ge=1, le=16)] = 3
    across_origins: list[Literal["llm", "rules", "human", "imported"]] = Field(
        default=["llm", "human", "imported"]
    )
    """Whose texts are compared across pictures. A program's sentences repeat by nature, and what
    differs is the picture: they are compared with samples on the same picture only."""
    across_words: PositiveInt = 20
    """Texts with fewer words are compared with samples on the same picture only."""


class SamePictureConfig(Section):
    """Pictures that look the same."""

    action: Literal["set_aside", "keep"] = "set_aside"
    """`set_aside`: samples on the later picture; `keep` opens no picture."""
    max_distance: Annotated[int, Field(ge=0, le=16)] = 6
    """Bits of 64 by which the perceptual hashes of candidates may differ."""
    max_difference: Annotated[float, Field(ge=0, le=255)] = 10.0
    """Mean difference of 16 x 16 colour thumbnails, of 255 and apart from their brightness, up to
    which candidates are the same; a perceptual hash alone sees no colour."""
    workers: PositiveInt = 1
    """Processes that open pictures; the result is the same for any number."""


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


class CleanConfig(Section):
    """What is taken out of the accepted samples; None or an empty list leaves a step out."""

    near_duplicates: NearDuplicatesConfig | None = NearDuplicatesConfig()
    same_questions: bool = True
    """Whether a question that was asked of the same picture before is set aside."""
    same_pictures: SamePictureConfig = SamePictureConfig()
    answers: AnswerBalanceConfig = AnswerBalanceConfig()
    openings: OpeningsConfig | None = OpeningsConfig()
    max_per_picture: PositiveInt | None = None
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
    """Put before every picture's name, e.g. `coco/train2017/`; the trainer's `image_root` is then
    the folder above."""
    box_frame: Literal["original", "padded_square"] = "original"
    """What box corners in texts are shares of: the picture, or the square that it is padded to."""


class InstructConfig(Section):
    """The whole file."""

    output_dir: str
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    coco: CocoConfig
    guard: GuardConfig = GuardConfig()
    pictures: PicturesConfig = PicturesConfig()
    requests: RequestsConfig = RequestsConfig()
    teacher: TeacherConfig
    limits: LimitsConfig = LimitsConfig()
    verify: VerifyConfig = VerifyConfig()
    clean: CleanConfig = CleanConfig()
    export: ExportConfig = ExportConfig()
