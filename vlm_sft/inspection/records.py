"""Records with what becomes of each, as training would decide it, and the choice of some."""

import difflib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vlm_sft.config.schema import DataConfig, DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.filtering import Admission, Outcome
from vlm_sft.data.ledger import Bucket, Entry
from vlm_sft.data.record_formats import open_records
from vlm_sft.data.tokenize import Renderer
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.progress import track

NO_LIMIT: Final = sys.maxsize
"""The `max_length` of records that are looked at without a configuration."""


@dataclass(frozen=True)
class Inspected:
    """A record and its end.

    Attributes:
        source: Number of its file, from 0.
        outcome: What becomes of it.
    """

    source: int
    outcome: Outcome

    @property
    def record(self) -> Conversation | RecordError:
        """As read, or why it could not be."""
        return self.outcome.record

    @property
    def entry(self) -> Entry:
        """Id, place, bucket and reason."""
        return self.outcome.entry

    @property
    def bucket(self) -> Bucket:
        """Where the ledger puts it."""
        return self.outcome.entry.bucket

    @property
    def conversation(self) -> Conversation | None:
        """As trained on; as read where it is not trained on; None where it could not be read."""
        if self.outcome.kept is not None:
            return self.outcome.kept
        return self.record if isinstance(self.record, Conversation) else None

    @property
    def length(self) -> int | None:
        """Tokens with image tokens, before turns are dropped; None where it was not rendered."""
        return None if self.outcome.whole is None else self.outcome.whole.length


@dataclass(frozen=True)
class Inspection:
    """What is looked at, and by which rules.

    Attributes:
        files: Where records come from.
        config: Its length limit and policy decide; `max_length` NO_LIMIT: none is too long.
        num_image_tokens: Features that an image becomes.
        look_for_images: An image whose file is not there makes its record faulty.
    """

    files: Sequence[DataFile]
    renderer: Renderer
    config: DataConfig
    num_image_tokens: int
    look_for_images: bool = True

    def names(self) -> list[str]:
        """What each file is called: its name, or its path where another has the same name."""
        names = Counter(Path(file.path).name for file in self.files)
        paths = [Path(file.path) for file in self.files]
        return [path.name if names[path.name] == 1 else str(path) for path in paths]

    def records(self, *, progress: bool = False) -> Iterator[Inspected]:
        """Every record in reading order; nothing is raised for a bad one.

        Args:
            progress: Show a bar on stderr where it takes long.
        """
        admission = Admission(
            self.renderer,
            num_image_tokens=self.num_image_tokens,
            config=self.config,
            look_for_images=self.look_for_images,
        )
        for number, file in enumerate(self.files):
            records = open_records(file)
            found = records.conversations
            if progress:
                found = track(found, records.total, f"reading {Path(file.path).name}")
            for outcome in admission.decide_all(found):
                yield Inspected(number, outcome)


@dataclass(frozen=True)
class Choice:
    """Which records are shown; what is None lets all through."""

    record_id: str | None = None
    reason: str | None = None
    longer_than: int | None = None
    shorter_than: int | None = None

    def takes(self, found: Inspected) -> bool:
        """Whether a record is one of them. One without a length is neither longer nor shorter."""
        length = found.length
        return (
            self.record_id in (None, found.entry.record_id)
            and self.reason in (None, found.entry.reason)
            and (self.longer_than is None or (length is not None and length > self.longer_than))
            and (self.shorter_than is None or (length is not None and length < self.shorter_than))
        )

    def words(self) -> str:
        """The choice as it was typed; "" for all records."""
        typed = {
            "--record": self.record_id,
            "--reason": self.reason,
            "--longer-than": self.longer_than,
            "--shorter-than": self.shorter_than,
        }
        return " ".join(f"{key} {value}" for key, value in typed.items() if value is not None)


def files_named(files: Sequence[DataFile], name: str) -> list[DataFile]:
    """The files of this path or, where none has it, of this name.

    Raises:
        UserError: There is none.
    """
    found = [file for file in files if file.path == name]
    found = found or [file for file in files if Path(file.path).name == name]
    if not found:
        paths = [file.path for file in files]
        names = [known for path in paths for known in (path, Path(path).name)]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": {', '.join(paths)}"
        raise UserError(f"--source {name}: no such file among those of this run{hint}")
    return found
