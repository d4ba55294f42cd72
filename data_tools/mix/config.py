"""What a mixture is told: its YAML file."""

import re
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator, model_validator

from data_tools.instruct.config import GuardConfig
from vlm_sft.config.fields import NonEmptyText
from vlm_sft.config.loading import Section

CANNOT_TELL: Final = (
    r"\b(?:can ?not|can['’]t|could ?n[o'’]t|unable to|(?:im|not )possible to|no way to|hard to) "
    r"(?:be )?(?:tell|told|say|said|know|known|determined?|seen?|read|answer(?:ed)?|identif\w+|"
    r"judged?|help)\b"
    r"|\bdoes(?: not|n['’]t) (?:say|show|tell|reveal|indicate)\b"
    r"|\bnot (?:enough information|visible in|shown in)\b"
    r"|\b(?:i am|i['’]m) (?:sorry|not able|unable)\b"
)
"""What an answer says that refuses, or that the image does not tell, where no receipt does."""

MOST_RECORDS: Final = 2**32 - 1
"""How often a record is taken is counted in 32 bits, and so is a mixture."""

RecordCount = Annotated[int, Field(ge=1, le=MOST_RECORDS)]


class SourceConfig(Section):
    """One file or folder of records, read as the trainer reads it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    """Stands before every id: `name/id`."""
    path: NonEmptyText
    format: Literal["auto", "llava", "messages", "alpaca"] = "auto"
    image_root: NonEmptyText | None = None
    """Folder that image names start from; None: the file's own folder."""
    weight: Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)] | None = None
    """Share relative to the other sources; None for all: as many as there are."""
    count: RecordCount | None = None
    """Records to take; in place of `weight`."""
    cap: RecordCount | None = None
    """At most so many are available."""
    replay: bool = False
    """Text alone, against forgetting; their share is `replay_share`."""
    receipts: NonEmptyText | None = None
    """`receipts.jsonl` of an export; None: the one beside the file, if there is one."""
    license: str = "not named"
    terms: str = "none named"
    """Of whoever made it, e.g. a teacher's provider; for the card."""

    @model_validator(mode="after")
    def _one_way(self) -> "SourceConfig":
        if self.weight is not None and self.count is not None:
            raise ValueError(f"{self.name}: give `weight` or `count`, not both")
        return self


class MixConfig(Section):
    """The whole file."""

    output_dir: NonEmptyText
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    total: RecordCount | None = None
    """Records of the mixture; None: as many as the weights allow without repeating one."""
    image_root: NonEmptyText | None = None
    """Folder that the mixture's image names start from; None: the sources' nearest common one."""
    replay_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of the mixture, from sources with `replay`; LLaVA-1.5: 40,688 of 665,298, or 0.061."""
    cannot_tell_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of the mixture: records with an answer that refuses, or that the image does not tell; None:
    as they come."""
    cannot_tell_pattern: Annotated[str, Field(max_length=10_000)] = CANNOT_TELL
    """Regular expression that tells such an answer where there is no receipt; any case."""
    when_short: Literal["error", "upsample"] = "error"
    """When more is wanted than there is: stop, or repeat records and say so."""
    missing_images: Literal["error", "leave_out"] = "error"
    bad_records: Literal["error", "leave_out"] = "error"
    guard: GuardConfig = GuardConfig()
    """Images that evaluations use are left out, by COCO's numeric id."""

    @field_validator("cannot_tell_pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
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
