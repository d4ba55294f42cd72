"""The configuration of `data_tools.mix`: the schema of its YAML file."""

import re
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator, model_validator

from data_tools.instruct.config import GuardConfig
from vlm_sft.config.fields import NonEmptyText
from vlm_sft.config.loading import Section
from vlm_sft.config.schema import ColumnNames, DataFormat

CANNOT_TELL: Final = (
    r"\b(?:can ?not|can['’]t|could ?n[o'’]t|unable to|(?:im|not )possible to|no way to|hard to) "
    r"(?:be )?(?:tell|told|say|said|know|known|determined?|seen?|read|answer(?:ed)?|identif\w+|"
    r"judged?|help)\b"
    r"|\bdoes(?: not|n['’]t) (?:say|show|tell|reveal|indicate)\b"
    r"|\bnot (?:enough information|visible in|shown in)\b"
    r"|\b(?:i am|i['’]m) (?:sorry|not able|unable)\b"
)
"""Matches answers that refuse or say that the image does not show it."""

MOST_RECORDS: Final = 2**32 - 1
"""Records and repetitions are counted in 32 bits."""

RecordCount = Annotated[int, Field(ge=1, le=MOST_RECORDS)]


class SourceConfig(Section):
    """A file or directory of records in a format that the trainer reads."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    """Name of the source; the ids of its records become `name/id`."""
    path: NonEmptyText
    """The file or directory."""
    format: DataFormat = "auto"
    """Format of the records or of the file, as in a training configuration. `auto` recognizes
    it."""
    columns: ColumnNames = ColumnNames()
    """Columns of a table that are not recognized by their names."""
    image_root: NonEmptyText | None = None
    """Directory that the image names start from. Null: the directory of the file."""
    weight: Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)] | None = None
    """Share relative to the other sources. Null for all sources: all their records."""
    count: RecordCount | None = None
    """Number of records to take, instead of `weight`."""
    cap: RecordCount | None = None
    """Most records to take."""
    replay: bool = False
    """Whether these are text-only records against forgetting, to which `replay_share` applies."""
    receipts: NonEmptyText | None = None
    """`receipts.jsonl` of an export. Null: the one next to the file, if there is one."""
    license: str = "not named"
    """License of the source, for the card."""
    terms: str = "none named"
    """Terms of use, e.g. those of the provider of the teacher, for the card."""

    @model_validator(mode="after")
    def _one_way(self) -> "SourceConfig":
        if self.weight is not None and self.count is not None:
            raise ValueError(f"{self.name}: give `weight` or `count`, not both")
        return self


class MixConfig(Section):
    """The configuration of a mixture."""

    output_dir: NonEmptyText
    """Directory of the mixture and its card."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the choice and order of the records."""
    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    """The sources."""
    total: RecordCount | None = None
    """Records of the mixture. Null: as many as the weights allow without repeating a record."""
    image_root: NonEmptyText | None = None
    """Directory that the image names of the mixture start from. Null: the nearest directory that
    contains those of all sources."""
    replay_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of records from sources with `replay`; in LLaVA-1.5 40,688 of 665,298, or 0.061. Null:
    no fixed share."""
    cannot_tell_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of records with an answer that refuses or says that the image does not show it. Null:
    no fixed share."""
    cannot_tell_pattern: Annotated[str, Field(max_length=10_000)] | None = None
    """Regular expression (case is ignored) for such answers in records without a receipt. Null: a
    built-in one for English."""
    when_short: Literal["error", "upsample"] = "error"
    """What to do if a source has too few records: stop, or repeat records and report it."""
    missing_images: Literal["error", "leave_out"] = "error"
    """What to do about records whose image does not exist."""
    bad_records: Literal["error", "leave_out"] = "error"
    """What to do about records that cannot be read."""
    guard: GuardConfig = GuardConfig()
    """Images that evaluations use, which are left out."""

    @field_validator("cannot_tell_pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            re.compile(value, re.IGNORECASE)
        except RecursionError:
            raise ValueError("not a regular expression: it is nested too deeply") from None
        except (re.error, OverflowError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _agree(self) -> "MixConfig":
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources: two have one name among {', '.join(names)}")
        if self.replay_share is not None and not any(source.replay for source in self.sources):
            raise ValueError("replay_share: no source has `replay: true`")
        if (self.replay_share or 0) + (self.cannot_tell_share or 0) >= 1:
            raise ValueError("replay_share and cannot_tell_share leave nothing for the rest")
        return self
