"""Read records with the filtering result that training would give each, and select some."""

import difflib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vlm_sft.config.schema import DataConfig, DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.filtering import FilterResult, RecordFilter
from vlm_sft.data.image_layout import ImageLayout, LayoutRule
from vlm_sft.data.ledger import Bucket, LedgerEntry
from vlm_sft.data.records import open_records
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.progress import track

NO_LIMIT: Final = sys.maxsize
"""The `max_length` of records that are inspected without a configuration."""


@dataclass(frozen=True)
class Inspected:
    """A record and its filtering result.

    Attributes:
        source: Index of its file.
        result: The decision of the record filter.
    """

    source: int
    result: FilterResult

    @property
    def record(self) -> Conversation | RecordError:
        """The record as read, or the error of one that cannot be read."""
        return self.result.source

    @property
    def entry(self) -> LedgerEntry:
        """The line of the ledger: id, place, bucket and reason."""
        return self.result.entry

    @property
    def bucket(self) -> Bucket:
        """The bucket of the ledger."""
        return self.result.entry.bucket

    @property
    def conversation(self) -> Conversation | None:
        """The record as trained; as read if training skips it; None if it cannot be read."""
        if self.result.record is not None:
            return self.result.record
        return self.record if isinstance(self.record, Conversation) else None

    @property
    def layouts(self) -> tuple[ImageLayout, ...]:
        """The layout of each image of `conversation`; empty if it could not be tokenized."""
        result = self.result
        return result.untruncated_layouts if result.record is None else result.layouts

    @property
    def length(self) -> int | None:
        """Tokens, image tokens included, before turns are dropped; None if not tokenized."""
        return None if self.result.untruncated is None else self.result.untruncated_length


@dataclass(frozen=True)
class Inspection:
    """Files to inspect, and the rules that filter their records.

    Attributes:
        files: Files of records.
        chat_tokenizer: Tokenizes the records.
        config: Length limit and policy; with `max_length` `NO_LIMIT`, no record is too long.
        layout_rule: Gives crops and tokens of every image.
        look_for_images: Whether a missing image file makes its record faulty.
    """

    files: Sequence[DataFile]
    chat_tokenizer: ChatTokenizer
    config: DataConfig
    layout_rule: LayoutRule
    look_for_images: bool = True

    def names(self) -> list[str]:
        """Return the display name of each file: its name, or its path if the name is not unique."""
        names = Counter(Path(file.path).name for file in self.files)
        paths = [Path(file.path) for file in self.files]
        return [path.name if names[path.name] == 1 else str(path) for path in paths]

    def records(self, *, progress: bool = False) -> Iterator[Inspected]:
        """Yield every record in file order; a faulty record raises nothing.

        Args:
            progress: Show a progress bar on stderr if it takes long.
        """
        record_filter = RecordFilter(
            self.chat_tokenizer,
            layout_rule=self.layout_rule,
            config=self.config,
            look_for_images=self.look_for_images,
        )
        for number, file in enumerate(self.files):
            records = open_records(file)
            found = records.conversations
            if progress:
                found = track(found, records.total, f"reading {Path(file.path).name}")
            for result in record_filter.filter_all(found):
                yield Inspected(number, result)


@dataclass(frozen=True)
class Selection:
    """Criteria that select records; a criterion that is None selects all."""

    record_id: str | None = None
    reason: str | None = None
    longer_than: int | None = None
    shorter_than: int | None = None

    def matches(self, found: Inspected) -> bool:
        """Return whether a record is selected.

        A record without a length is neither longer nor shorter than a limit.
        """
        length = found.length
        return (
            self.record_id in (None, found.entry.record_id)
            and self.reason in (None, found.entry.reason)
            and (self.longer_than is None or (length is not None and length > self.longer_than))
            and (self.shorter_than is None or (length is not None and length < self.shorter_than))
        )

    def __str__(self) -> str:
        """Return the options as typed; "" if all records are selected."""
        options = {
            "--record": self.record_id,
            "--reason": self.reason,
            "--longer-than": self.longer_than,
            "--shorter-than": self.shorter_than,
        }
        return " ".join(f"{key} {value}" for key, value in options.items() if value is not None)


def files_named(files: Sequence[DataFile], name: str) -> list[DataFile]:
    """Return the files with this path or, if there are none, with this name.

    Raises:
        UserError: No file has this path or name.
    """
    found = [file for file in files if file.path == name]
    found = found or [file for file in files if Path(file.path).name == name]
    if not found:
        paths = [file.path for file in files]
        names = [known for path in paths for known in (path, Path(path).name)]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": {', '.join(paths)}"
        raise UserError(f"--source {name}: no such file in this run{hint}")
    return found
