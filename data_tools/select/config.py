"""The configuration of `data_tools.select`: the schema of its YAML file, and its presets."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from vlm_sft.config.fields import NonEmptyText
from vlm_sft.config.loading import Section
from vlm_sft.config.schema import ColumnNames, DataFile, DataFormat

Metric = Literal[
    "answer_words", "turns", "answer_tokens", "loss", "perplexity", "ifd", "necessity",
    "weak_loss", "consistency", "solved", "teacher", "clip",
]  # fmt: skip
"""Columns that records can be ranked and limited by; docs/data-engine.md defines them."""

MODEL_METRICS: Final = ("answer_tokens", "loss", "perplexity", "ifd", "necessity")

PRESETS: Final[dict[str, dict[str, Any]]] = {
    "ifd": {"rank_by": "ifd", "keep": {"ifd": [0.0, 1.0], "answer_tokens": [8, None]}},
    "lima": {
        "rank_by": "answer_words",
        "middle": {"perplexity": 0.8},
        "diversity": "clusters",
        "merge_similar": 0.95,
    },
    "s1": {
        "rank_by": "answer_words",
        "keep": {"solved": [0.0, 0.99]},
        "quotas": "equal",
        "merge_similar": 0.95,
    },
}
"""Settings of each preset; those of the file replace them."""

Limits = Annotated[list[float | None], Field(min_length=2, max_length=2)]


class SelectConfig(Section):
    """The configuration of a selection."""

    output_dir: NonEmptyText
    """Directory of the scores, of the selected and of the random records."""
    path: NonEmptyText
    """The file or directory of records, or hf://datasets/OWNER/NAME, as in a training
    configuration."""
    format: DataFormat = "auto"
    """Format of the records or of the file, as in a training configuration. `auto` recognizes
    it."""
    columns: ColumnNames = ColumnNames()
    """Columns of a table that are not recognized by their names."""
    annotations: NonEmptyText | None = None
    """File with the answers to the questions of `path` (`vqa`). Null: they are in `path`."""
    image_name: NonEmptyText | None = None
    """Name of the image of an `image_id` (`vqa`), e.g. `{image_id}.jpg`. Null: the questions name
    it."""
    image_root: NonEmptyText | None = None
    """Directory that the image names start from. Null: the directory of the file."""
    follow_symlinks: bool = False
    """Allow symbolic links that leave `image_root`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the random records and of the clusters."""
    preset: Literal["ifd", "lima", "s1"] | None = None
    """Settings to start from: `ifd` (Cherry), `lima` (few, diverse, long answers) or `s1` (not yet
    solved, equal shares of the categories)."""
    model: NonEmptyText | None = None
    """Checkpoint or finished model for losses, IFD, visual necessity and embeddings. Null: none of
    these."""
    weak_model: NonEmptyText | None = None
    """A weaker model, for `weak_loss`."""
    clip_model: NonEmptyText | None = None
    """Folder or hub name of a CLIP or SigLIP model of transformers, for `clip`."""
    samples: NonEmptyText | None = None
    """`samples.jsonl` of `vlm-sft sample` on the same file, for `consistency` and `solved`."""
    teacher_samples: NonEmptyText | None = None
    """The same of a stronger model, for `teacher`."""
    decisions: NonEmptyText | None = None
    """Folder of decisions that `data review` has written: records that a reviewer has rejected are
    left out, and edited ones are used with the new text. Null: none are read."""
    instances: NonEmptyText | None = None
    """COCO's `instances_*.json`: with `decisions`, texts that reviewers have edited are verified
    against it, and left out if it contradicts them."""
    captions: NonEmptyText | None = None
    """COCO's `captions_*.json`, likewise."""
    batching: Literal["padded", "packed"] = "padded"
    """How records go through the model; the scores are the same."""
    max_tokens: Annotated[int, Field(ge=64)] = 4096
    """Tokens that go through the model together."""
    device: NonEmptyText | None = None
    """cpu, cuda, cuda:1, ... Null: cuda if available."""
    category_key: NonEmptyText = "type"
    """Key of a record that names its category, of VQA e.g. `question_type` or `answer_type`;
    records without it are one category."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Records to select. Null: `share`."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the usable records to select."""
    rank_by: Metric = "answer_words"
    """Column that decides which records are taken first."""
    order: Literal["highest", "lowest"] = "highest"
    """Which of its values come first."""
    keep: dict[Metric, Limits] = Field(default={})
    """Least and greatest value of columns, e.g. {ifd: [0, 1]}; null for no limit. A record without
    the value is left out."""
    middle: dict[Metric, Annotated[float, Field(gt=0, le=1)]] = Field(default={})
    """Share of the records to keep around the median of a column."""
    merge_similar: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of records whose embeddings have a greater cosine, only the first in rank is taken."""
    diversity: Literal["none", "k_center", "clusters"] = "none"
    """Within each category: the first in rank, the farthest from those taken (of the first in
    rank), or the first in rank of each cluster."""
    quotas: Literal["none", "proportional", "equal"] = "proportional"
    """Shares of the categories: none, those of the usable records, or equal ones."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if isinstance(preset, str) and preset in PRESETS:
            return {**PRESETS[preset], **values}
        return values

    @model_validator(mode="after")
    def _limits_in_order(self) -> "SelectConfig":
        for metric, (low, high) in self.keep.items():
            if low is not None and high is not None and low > high:
                raise ValueError(f"keep.{metric}: the least value {low:g} is above {high:g}")
        return self

    @model_validator(mode="after")
    def _computable(self) -> "SelectConfig":
        for metric in {self.rank_by, *self.keep, *self.middle}:
            if metric in MODEL_METRICS and self.model is None:
                raise ValueError(f"{metric} needs `model`")
            if metric == "weak_loss" and self.weak_model is None:
                raise ValueError("weak_loss needs `weak_model`")
            if metric == "clip" and self.clip_model is None:
                raise ValueError("clip needs `clip_model`")
            if metric in ("consistency", "solved") and self.samples is None:
                raise ValueError(f"{metric} needs `samples`: vlm-sft sample writes them")
            if metric == "teacher" and self.teacher_samples is None:
                raise ValueError("teacher needs `teacher_samples`")
        if (self.diversity != "none" or self.merge_similar) and self.model is None:
            raise ValueError("diversity and merge_similar need `model`, for embeddings")
        return self

    def data_file(self) -> DataFile:
        """Return the records as a training configuration has them."""
        return DataFile(
            path=self.path,
            format=self.format,
            columns=self.columns,
            annotations=self.annotations,
            image_name=self.image_name,
            image_root=self.image_root,
            follow_symlinks=self.follow_symlinks,
        )
