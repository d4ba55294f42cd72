"""Decisions of reviewers: appended to a file each, read again, and applied to samples."""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from data_tools.instruct.generate.append_only import append_line, remove_cut_line
from data_tools.instruct.lines import read_lines
from vlm_sft.errors import UserError
from vlm_sft.utils.filesystem import lock

REASONS: Final = {
    "wrong_answer": "the answer is wrong",
    "not_in_image": "says what the image does not show",
    "bad_question": "the question is unclear or needs no image",
    "bad_image": "the image is unusable",
    "trivial": "teaches nothing",
    "language": "wording, language or style",
    "other": "something else",
}
"""Why a reviewer rejects a sample; the page has the keys 1, 2, ... for them."""

_BEGINNING: Final = b'{"schema":"vlm_sft.decision/'
"""First bytes of every line."""
_REVIEWER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


class EditedTurn(BaseModel):
    """A question with its answer as a reviewer wrote them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: Annotated[str, Field(max_length=100_000)]
    answer: Annotated[str, Field(min_length=1, max_length=100_000)]


class Decision(BaseModel):
    """One line of a file of decisions.

    Attributes:
        id: The sample's id.
        digest: Of its content when it was shown, of `content_of`.
        decision: `undo` takes back the reviewer's last decision about the sample.
        reason: A key of `REASONS`, for `reject`.
        turns: The whole text after an `edit`, which also accepts the sample.
        time: UTC, ISO 8601.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Annotated[Literal["vlm_sft.decision/1"], Field(alias="schema")] = "vlm_sft.decision/1"
    id: str
    digest: str
    reviewer: str
    decision: Literal["accept", "reject", "edit", "undo"]
    reason: str | None = None
    turns: tuple[EditedTurn, ...] | None = None
    time: str

    @property
    def words(self) -> str:
        """What was decided, and by whom, in words."""
        done = {"accept": "accepted", "reject": "rejected", "edit": "edited", "undo": "undone"}
        why = f": {REASONS.get(self.reason, self.reason)}" if self.reason else ""
        return f"{done[self.decision]} by {self.reviewer}{why}"


def content_of(texts: Iterable[str], images: Iterable[str | bytes]) -> str:
    """Return the digest that tells a changed sample from the one that was decided about.

    An exported record has the digest of its sample: of an image's name only the last part counts,
    and white space around a text does not.

    Args:
        texts: Of the turns, in order.
        images: Names of the image files, or the bytes of embedded ones.
    """
    names = [
        hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else PurePosixPath(image).name
        for image in images
    ]
    content = json.dumps([[text.strip() for text in texts], names])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def require_reviewer(name: str) -> str:
    """Return a reviewer's name, which is also that of a file.

    Raises:
        UserError: It has other characters than letters, digits, dots, dashes and underscores.
    """
    if not _REVIEWER.fullmatch(name):
        raise UserError(
            f"--reviewer {name!r}: expected up to 40 letters, digits, dots, dashes or underscores"
        )
    return name


@dataclass
class ReviewerLog:
    """The decisions of one reviewer: a file that only grows.

    Each line is one write, and on the disk before the page hears of it. A line that a kill has cut
    is removed at the next start, with a note.

    Args:
        folder: Folder of the files of all reviewers.
        reviewer: The reviewer's name.

    Raises:
        UserError: The file is damaged, or open in another process.
    """

    folder: Path
    reviewer: str
    path: Path = field(init=False)
    done: list[Decision] = field(init=False)
    """Decisions that were not taken back, the last one last."""

    def __post_init__(self) -> None:
        self.path = self.folder / f"{self.reviewer}.jsonl"
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if lock(self._descriptor, self.path, wait=False) == "held_elsewhere":
                raise UserError(
                    f"{self.path}: {self.reviewer} reviews in another process; close it, or give "
                    "another --reviewer",
                    code="folder_in_use",
                )
            remove_cut_line(self._descriptor, self.path, _BEGINNING)
            self.done = standing(read_lines(self.path, Decision))
        except BaseException:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def latest(self) -> dict[tuple[str, str], Decision]:
        """Return the decision that holds for each id and digest."""
        return {(one.id, one.digest): one for one in self.done}

    def append(
        self,
        sample_id: str,
        digest: str,
        decision: Literal["accept", "reject", "edit"],
        *,
        reason: str | None = None,
        turns: Sequence[EditedTurn] | None = None,
    ) -> Decision:
        """Write a decision to the disk and return it."""
        new = Decision(
            id=sample_id, digest=digest, reviewer=self.reviewer, decision=decision, reason=reason,
            turns=None if turns is None else tuple(turns), time=_now(),
        )  # fmt: skip
        self._write(new)
        self.done.append(new)
        return new

    def undo(self) -> Decision | None:
        """Take back the reviewer's last decision and return it; None if there is none."""
        if not self.done:
            return None
        last = self.done[-1]
        self._write(
            Decision(
                id=last.id, digest=last.digest, reviewer=self.reviewer, decision="undo", time=_now()
            )
        )
        return self.done.pop()

    def _write(self, line: Decision) -> None:
        data = line.model_dump_json(by_alias=True, exclude_none=True).encode() + b"\n"
        append_line(self._descriptor, data, self.path)
        os.fsync(self._descriptor)


def standing(lines: Iterable[Decision]) -> list[Decision]:
    """Return the decisions that were not taken back, in the order of the lines."""
    done: list[Decision | None] = []
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    for line in lines:
        key = (line.id, line.digest)
        if line.decision != "undo":
            places[key].append(len(done))
            done.append(line)
        elif places[key]:
            done[places[key].pop()] = None
    return [one for one in done if one is not None]


def read_decisions(folder: str | Path) -> dict[str, dict[str, list[Decision]]]:
    """Return all decisions that stand, by reviewer and id, the last one last.

    Raises:
        UserError: There is no such folder, it has no file of decisions, or one is damaged.
    """
    paths = sorted(Path(folder).glob("*.jsonl"))
    if not paths:
        raise UserError(
            f"{folder}: has no decisions; give the folder that `vlm-sft data review` has written",
            code="data_file_missing",
        )
    found: dict[str, dict[str, list[Decision]]] = {}
    for path in paths:
        by_id: dict[str, list[Decision]] = defaultdict(list)
        for one in standing(read_lines(path, Decision)):
            by_id[one.id].append(one)
        found[path.stem] = dict(by_id)
    return found


@dataclass
class Verdicts:
    """What all reviewers together say of samples, and how often.

    A rejection by one reviewer counts more than an acceptance by another; of several edits the
    last one in time is taken.

    Attributes:
        counts: `accepted`, `rejected`, `edited`, `disagreements` (samples that one rejects and
            another does not), and `changed` (samples that are not those that were decided about).
        unused: Ids with decisions that no sample has had yet.
    """

    decisions: Mapping[str, Mapping[str, list[Decision]]]
    counts: Counter[str] = field(default_factory=Counter)
    unused: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.unused = {name for by_id in self.decisions.values() for name in by_id}

    def of(self, sample_id: str, digest: Callable[[], str]) -> Decision | None:
        """Return the decision that applies to a sample; None without one.

        Args:
            sample_id: The sample's id.
            digest: Returns its `content_of`; called only if there are decisions about the id.
        """
        by_reviewer = [by_id[sample_id] for by_id in self.decisions.values() if sample_id in by_id]
        if not by_reviewer:
            return None
        now = digest()
        latest = [same[-1] for of in by_reviewer if (same := [d for d in of if d.digest == now])]
        rejected = [one for one in latest if one.decision == "reject"]
        edited = sorted((one for one in latest if one.decision == "edit"), key=lambda one: one.time)
        chosen = (rejected or edited or latest)[-1] if latest else None
        if sample_id in self.unused:  # counted once, however often it is asked for
            self.unused.discard(sample_id)
            self.counts["disagreements"] += 0 < len(rejected) < len(latest)
            names = {"accept": "accepted", "reject": "rejected", "edit": "edited"}
            self.counts["changed" if chosen is None else names[chosen.decision]] += 1
        return chosen

    def summary(self) -> dict[str, int]:
        """Return the counts; `unknown_ids` are decisions about samples that are not there."""
        names = ("accepted", "rejected", "edited", "disagreements", "changed")
        return {name: self.counts[name] for name in names} | {"unknown_ids": len(self.unused)}

    def lines(self) -> str:
        """Return the counts in words."""
        found = self.summary()
        text = (
            f"review: {found['accepted']:,} accepted, {found['edited']:,} edited, "
            f"{found['rejected']:,} rejected"
        )
        if found["disagreements"]:
            text += f"; reviewers disagree about {found['disagreements']:,}, which are rejected"
        if found["changed"]:
            text += f"\nnot applied: decisions about {found['changed']:,} samples that have changed"
        if found["unknown_ids"]:
            text += f"\nnot applied: decisions about {found['unknown_ids']:,} ids that are not here"
        return text


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
