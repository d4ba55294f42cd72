"""First reading of all sources: what each record is, in 28 bytes, and why some cannot be used."""

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from data_tools.instruct.clean.texts import digest
from data_tools.mix.config import CANNOT_TELL, MixConfig, SourceConfig
from data_tools.mix.guard import coco_id, guarded_ids
from data_tools.mix.quotas import Available, Quota
from data_tools.mix.receipts import Receipts
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation, TextPart
from vlm_sft.data.records import open_records
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.image_paths import current_directory_hint, nearest_existing
from vlm_sft.utils.progress import track

LEFT_OUT: Final = ("bad record", "image missing", "evaluation image", "repeats an earlier one")
"""Why a record is not available; a state above 0 is a place in this list, counted from 1."""

_BAD, _MISSING, _GUARDED, _REPEATED = 1, 2, 3, 4


@dataclass
class Source:
    """One source as it was found.

    Attributes:
        config: As given.
        states: 0 for a usable record, else `LEFT_OUT`, in the order of the file.
        unsure: Whether an answer refuses or says that the image does not show it.
        orders: Random numbers by seed, source and content.
        ids: Digests of the records' own ids.
        contents: Digests of texts and image names.
        models: Who wrote each record, a place in `model_names`; 0 where no receipt says so.
        embedded: Images inside of the file, which the guard cannot know by name.
        bad: Reasons of bad records.
        examples: A first case of whatever was left out.
    """

    config: SourceConfig
    states: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    unsure: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    orders: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    ids: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    contents: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    models: NDArray[np.uint16] = field(default_factory=lambda: np.zeros(0, np.uint16))
    model_names: list[str] = field(default_factory=lambda: [""])
    embedded: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def available(self, split: bool) -> Available:
        """Return the numbers of usable records; `split` counts unsure ones separately."""
        usable = self.states == 0
        unsure = int((usable & self.unsure).sum()) if split else 0
        return Available(int(usable.sum()) - unsure, unsure)

    def teachers(self, times: NDArray[np.uint32]) -> dict[str, int]:
        """How many of the taken records each model wrote; "" for those without a receipt."""
        counts = np.bincount(self.models, times, minlength=len(self.model_names))
        found = {n: int(c) for n, c in zip(self.model_names, counts, strict=True) if c}
        return dict(sorted(found.items()))

    def left_out(self) -> dict[str, int]:
        """How many are not available, by reason."""
        counts = np.bincount(self.states, minlength=len(LEFT_OUT) + 1)[1:].tolist()
        return {what: count for what, count in zip(LEFT_OUT, counts, strict=True) if count}


def data_file(source: SourceConfig) -> DataFile:
    """Return the source as an entry of the trainer's `data.train`."""
    return DataFile(path=source.path, format=source.format, image_root=source.image_root)


def scan(config: MixConfig) -> list[Source]:
    """Read every record of every source once; the first of several equal records is usable.

    Raises:
        UserError: A file cannot be read; or there is a bad record or a missing image and
            `bad_records` or `missing_images` says `error`; or a replay source has images.
    """
    for given in config.sources:
        if not Path(given.path).exists():
            raise UserError(
                f"source {given.name}: {given.path}: no such file or folder"
                f"{current_directory_hint(given.path)}{nearest_existing(given.path)}; correct "
                "`path` of this source under `sources`",
                code="data_file_missing",
            )
    guarded = guarded_ids(config.guard)
    sources = [_Scan(config, source, guarded).run() for source in config.sources]
    everything = np.concatenate([source.contents for source in sources])
    usable = np.concatenate([source.states for source in sources]) == 0
    places = np.flatnonzero(usable)
    _, first, which = np.unique(everything[places], return_index=True, return_inverse=True)
    repeated = np.zeros(len(everything), np.bool_)
    repeated[places] = first[which] != np.arange(len(places))
    start = 0
    for source in sources:
        end = start + len(source.states)
        source.states[repeated[start:end]] = _REPEATED
        start = end
    return sources


class _Scan:
    """The reading of one source."""

    def __init__(self, config: MixConfig, source: SourceConfig, guarded: frozenset[int]) -> None:
        self._config, self._guarded = config, guarded
        self._found = Source(source)
        self._pattern = re.compile(config.cannot_tell_pattern or CANNOT_TELL, re.IGNORECASE)
        self._receipts = _receipts(source)

    def run(self) -> Source:
        found, columns = self._found, {name: array(code) for name, code in _COLUMNS.items()}
        name = found.config.name
        records = open_records(data_file(found.config))
        for record in track(records.conversations, records.total, f"reading {name}"):
            if isinstance(record, RecordError):
                self._refuse_bad(record)
                values = (_BAD, False, 0, 0, 0, 0)
            else:
                content = content_digest(record)
                order = digest(self._config.seed, name, content, record.id)
                state = self._state(record)
                model, unsure = self._written(record)
                values = (state, unsure, order, digest(record.id), content, model)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        for key, column in columns.items():
            setattr(found, key, np.array(column))
        found.unsure = found.unsure.astype(np.bool_)
        return found

    def _refuse_bad(self, error: RecordError) -> None:
        if self._config.bad_records == "error":
            raise UserError(
                f"{error}; fix it, or set `bad_records: leave_out` to mix without such records",
                code=error.reason,
            )
        self._found.bad[error.reason] += 1
        self._found.examples.setdefault(LEFT_OUT[_BAD - 1], str(error))

    def _state(self, record: Conversation) -> int:
        source = self._found.config
        if source.replay and record.images:
            raise UserError(
                f"{record.where}: source {source.name} is for replay, which is text alone, and "
                f"record {record.id!r} has an image; take `replay` away, or the record"
            )
        for image in record.images:
            if isinstance(image, bytes):
                self._found.embedded += 1
                continue
            if not self._config.guard.allow_evaluation_images and coco_id(image) in self._guarded:
                self._found.examples.setdefault(LEFT_OUT[_GUARDED - 1], f"{record.where}: {image}")
                return _GUARDED
            if not image.is_file():
                self._refuse_missing(record, image)
                return _MISSING
        return 0

    def _refuse_missing(self, record: Conversation, image: Path) -> None:
        if self._config.missing_images == "error":
            raise UserError(
                f"{record.where}: record {record.id!r}: there is no image {image}; fix "
                f"`image_root` of source {self._found.config.name}, or set `missing_images: "
                "leave_out` to mix without such records",
                code="image_missing",
            )
        self._found.examples.setdefault(LEFT_OUT[_MISSING - 1], f"{record.where}: {image}")

    def _written(self, record: Conversation) -> tuple[int, bool]:
        """Return the model's number, and whether an answer is unsure, by receipt or by words."""
        receipt = self._receipts.find(record.id) if self._receipts else None
        if receipt is not None:
            names = self._found.model_names
            if receipt[0] not in names:
                names.append(receipt[0])
            return names.index(receipt[0]), receipt[1]
        return 0, any(
            turn.role == "assistant" and self._pattern.search(turn.text) is not None
            for turn in record.turns
        )


_COLUMNS: Final = {
    "states": "B",
    "unsure": "B",
    "orders": "Q",
    "ids": "Q",
    "contents": "Q",
    "models": "H",
}


def _receipts(source: SourceConfig) -> Receipts | None:
    if source.receipts is not None:
        path = Path(source.receipts)
        if not path.is_file():
            raise UserError(f"source {source.name}: no receipts {path}", code="data_file_missing")
        return Receipts(path)
    default = Path(source.path).parent / "receipts.jsonl"
    return Receipts(default) if default.is_file() else None


def content_digest(record: Conversation) -> int:
    """Equal for records with the same words, roles and images.

    An image is known by its bytes where it is inside of the file, else by its file's name with the
    folder above, so that `train2017/1.jpg` is one image under any root.
    """
    texts = [
        [turn.role, [part.text if isinstance(part, TextPart) else "\0" for part in turn.parts]]
        for turn in record.turns
    ]
    images = [
        digest(image) if isinstance(image, bytes) else os.sep.join(image.parts[-2:])
        for image in record.images
    ]
    return digest(texts, images)


def selected(source: Source, quota: Quota, split: bool) -> NDArray[np.uint32]:
    """How often each record is taken: those with the smallest `orders`, all again if too few."""
    times = np.zeros(len(source.states), np.uint32)
    usable = source.states == 0
    pools: list[tuple[NDArray[np.bool_], int]] = [(usable, quota.plain)]
    if split:
        pools = [
            (usable & ~source.unsure, quota.plain),
            (usable & source.unsure, quota.cannot_tell),
        ]
    for pool, wanted in pools:
        places = np.flatnonzero(pool)
        if not wanted or not len(places):
            continue
        places = places[np.argsort(source.orders[places], kind="stable")]
        if source.config.cap is not None:
            places = places[: source.config.cap]
        rounds, more = divmod(wanted, len(places))
        times[places] = rounds
        times[places[:more]] += 1
    return times


def conversations(source: SourceConfig) -> Iterator[Conversation | RecordError]:
    """The source's records once more, in the same order."""
    return open_records(data_file(source)).conversations
