"""Read all sources once: a few numbers per record, and why some records cannot be used."""

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.digests import hashed
from data_tools.instruct.contamination import coco_id, read_ids
from data_tools.mix.config import CANNOT_TELL, MixConfig, SourceConfig
from data_tools.mix.quotas import RecordCounts
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation, TextPart
from vlm_sft.data.records import open_records
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.image_paths import current_directory_hint, nearest_existing
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import open_regular

USABLE: Final = ""
BAD: Final = "bad record"
MISSING: Final = "image missing"
EVALUATION: Final = "evaluation image"
REPEATED: Final = "repeats an earlier one"

_STATES: Final = (USABLE, BAD, MISSING, EVALUATION, REPEATED)


@dataclass
class Source:
    """A source and its records.

    Attributes:
        config: Its configuration.
        records: A row per record, in the order of the file: `state` (`USABLE`, or why it is left
            out), `cannot_tell`, `order` (random, by seed, source and content), digests of its `id`
            (0 for a bad record) and `content`, and the `model` that wrote it ("" without receipt).
        num_embedded: Images inside the file; they have no name, so the guard cannot know them.
        bad: Reasons of bad records.
        examples: The first record of each state that is left out.
    """

    config: SourceConfig
    records: pd.DataFrame
    num_embedded: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> pd.DataFrame:
        """The records that can be taken."""
        return self.records[self.records["state"] == USABLE]

    def available(self, *, split: bool) -> RecordCounts:
        """Count the usable records; `split` counts those that cannot tell separately."""
        usable = self.usable
        unsure = int(usable["cannot_tell"].sum()) if split else 0
        return RecordCounts(len(usable) - unsure, unsure)

    def models(self, times: NDArray[np.uint32]) -> dict[str, int]:
        """Count the taken records by the model that wrote them."""
        counts = pd.Series(times.astype(np.int64)).groupby(self.records["model"]).sum()
        return {str(name): int(count) for name, count in counts.sort_index().items() if count}

    def left_out(self) -> dict[str, int]:
        """Count the records that cannot be used, by reason."""
        counts = self.records["state"].value_counts()
        return {state: int(counts[state]) for state in _STATES[1:] if counts[state]}

    def conversations(self) -> Iterator[Conversation | RecordError]:
        """Read the records again, in the same order."""
        return open_records(data_file(self.config)).conversations


def data_file(source: SourceConfig) -> DataFile:
    """Return the source as the trainer's configuration has it."""
    return DataFile(
        path=source.path,
        format=source.format,
        columns=source.columns,
        image_root=source.image_root,
    )


def read_sources(config: MixConfig) -> list[Source]:
    """Read every record of every source; of equal records only the first is usable.

    Raises:
        UserError: A file cannot be read; there is a bad record or a missing image and `bad_records`
            or `missing_images` is `error`; or a replay source has images.
    """
    for settings in config.sources:
        path = settings.path
        if not Path(path).exists():
            raise UserError(
                f"source {settings.name}: {path}: no such file or folder"
                f"{current_directory_hint(path)}{nearest_existing(path)}; correct `path` of this "
                "source under `sources`",
                code="data_file_missing",
            )
    guarded = _guarded_ids(config)
    sources = [_read(config, settings, guarded) for settings in config.sources]
    contents = pd.concat([s.usable["content"] for s in sources], keys=range(len(sources)))
    repeated = contents.index[contents.duplicated()]
    for number, source in enumerate(sources):
        rows = repeated[repeated.get_level_values(0) == number].get_level_values(1)
        source.records.loc[rows, "state"] = REPEATED
    return sources


def _guarded_ids(config: MixConfig) -> frozenset[int]:
    """Return the COCO ids of the images to leave out; the lists are checked in any case."""
    found: frozenset[int] = frozenset()
    for evaluation, files in config.guard.lists.items():
        for name in [files] if isinstance(files, str) else files:
            found |= read_ids(Path(name), evaluation)
    return frozenset() if config.guard.allow_evaluation_images else found


def _refused(error: RecordError) -> UserError:
    return UserError(
        f"{error}; fix it, or set `bad_records: leave_out` to mix without such records",
        code=error.reason,
    )


def _read(config: MixConfig, settings: SourceConfig, guarded: frozenset[int]) -> Source:
    pattern = re.compile(config.cannot_tell_pattern or CANNOT_TELL, re.IGNORECASE)
    source = Source(settings, pd.DataFrame())
    columns = [array(code) for code in "BBQQQ"]
    file = open_records(data_file(settings))
    for record in track(file.conversations, file.total, f"reading {settings.name}"):
        if isinstance(record, RecordError):
            if config.bad_records == "error":
                raise _refused(record)
            source.bad[record.reason] += 1
            source.examples.setdefault(BAD, str(record))
            row = [_STATES.index(BAD), False, 0, 0, 0]
        else:
            content = content_digest(record)
            answers = (turn.text for turn in record.turns if turn.role == "assistant")
            row = [
                _STATES.index(_state(record, source, config, guarded)),
                any(pattern.search(answer) for answer in answers),
                hashed(config.seed, settings.name, content, record.id),
                hashed(record.id),
                content,
            ]
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    names = ("state", "cannot_tell", "order", "id", "content")
    # pandas cannot join NumPy's type for array("Q"), which is another one than uint64.
    dtypes = (np.int8, np.bool_, np.uint64, np.uint64, np.uint64)
    records = pd.DataFrame(
        {
            name: np.array(column, dtype)
            for name, column, dtype in zip(names, columns, dtypes, strict=True)
        }
    )
    records["state"] = pd.Categorical.from_codes(records["state"], _STATES)
    records["model"] = ""
    if (path := _receipts_path(settings)) is not None:
        # What a receipt says counts more than what the answer looks like.
        found = records[["id"]].merge(_read_receipts(path), how="left", on="id")
        known = found["model"].notna()
        records["model"] = found["model"].fillna("")
        records.loc[known, "cannot_tell"] = found["cannot_tell"][known].astype(bool)
    records["model"] = records["model"].astype("category")
    source.records = records
    return source


def _state(record: Conversation, source: Source, config: MixConfig, guarded: frozenset[int]) -> str:
    """Return whether a record can be used.

    Raises:
        UserError: It must not be left out by the configuration.
    """
    settings = source.config
    if settings.replay and record.images:
        raise UserError(
            f"{record.where}: source {settings.name} is for replay, which is text alone, and "
            f"record {record.id!r} has an image; remove `replay` or the record"
        )
    for image in record.images:
        if isinstance(image, bytes):
            source.num_embedded += 1
            continue
        state = USABLE
        if coco_id(image) in guarded:
            state = EVALUATION
        elif not image.is_file():
            if config.missing_images == "error":
                raise UserError(
                    f"{record.where}: record {record.id!r}: there is no image {image}; correct "
                    f"`image_root` of source {settings.name}, or set `missing_images: leave_out` "
                    "to mix without such records",
                    code="image_missing",
                )
            state = MISSING
        if state:
            source.examples.setdefault(state, f"{record.where}: {image}")
            return state
    return USABLE


def _receipts_path(source: SourceConfig) -> Path | None:
    """Return the receipts of a source: as configured, or next to its file."""
    if source.receipts is None:
        path = Path(source.path).parent / "receipts.jsonl"
        return path if path.is_file() else None
    path = Path(source.receipts)
    if not path.is_file():
        raise UserError(f"source {source.name}: no receipts {path}", code="data_file_missing")
    return path


def _read_receipts(path: Path) -> pd.DataFrame:
    """Return the `model` and `cannot_tell` of each receipt, by the digest of the record's `id`."""
    ids, cannot_tell, models, known = array("Q"), array("B"), array("i"), dict[str, int]()
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            try:
                receipt = json.loads(line)
                if not isinstance(receipt["id"], str) or not isinstance(receipt["kinds"], list):
                    raise TypeError
                model = str(receipt["model"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"{path}:{number}: expected a receipt with `id`, `model` and `kinds`; give the "
                    "receipts.jsonl that `export` wrote",
                    code="json_syntax",
                ) from None
            ids.append(hashed(receipt["id"]))
            models.append(known.setdefault(model, len(known)))
            cannot_tell.append("cannot_tell" in receipt["kinds"])
    receipts = pd.DataFrame(
        {"id": np.array(ids, np.uint64), "cannot_tell": np.array(cannot_tell, np.bool_)}
    )
    receipts["model"] = np.array([*known, ""], object)[np.array(models, int)]
    return receipts.drop_duplicates("id")


def content_digest(record: Conversation) -> int:
    """Return a digest that is equal for records with the same words, roles and images.

    An image inside the file is identified by its bytes, others by the file name with its parent
    directory, so that `train2017/1.jpg` is the same image under any root.
    """
    texts = [
        [turn.role, [part.text if isinstance(part, TextPart) else "\0" for part in turn.parts]]
        for turn in record.turns
    ]
    images = [
        hashed(image) if isinstance(image, bytes) else os.sep.join(image.parts[-2:])
        for image in record.images
    ]
    return hashed(texts, images)
