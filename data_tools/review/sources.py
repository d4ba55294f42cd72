"""What is reviewed: the samples of a run, or records of any file that training reads."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from data_tools.coco import AnnotatedImage, read_coco
from data_tools.instruct.config import InstructConfig, VerifyConfig
from data_tools.instruct.index import read_categories, read_images
from data_tools.instruct.report.samples import ImageView, view_image
from data_tools.instruct.run_folder import RunFolder, refuse_older
from data_tools.instruct.schema import Check, ImageSource, Sample, Shown, Turn
from data_tools.instruct.verify import Policy, check_sample, reasons
from data_tools.instruct.verify.codes import NOT_CLAIMS
from data_tools.instruct.verify.llava_records import (
    ImageFinder,
    imported_sample,
    kind_of,
    type_of,
)
from data_tools.review.decisions import EditedTurn, content_of
from vlm_sft.best_of.questions import numbered_id
from vlm_sft.config import loading as settings
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart
from vlm_sft.data.conversation import Turn as Said
from vlm_sft.data.record_formats import RawRecord
from vlm_sft.data.records import open_raw_records, open_records
from vlm_sft.errors import ImageError, UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.image_paths import image_path
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import open_regular

OWN_CHECKS: Final = ("constraints", "multi-image", "refuse", "translate")
"""Operators of `grow` whose samples are not verified by their image alone."""


@dataclass(frozen=True)
class Item:
    """A few facts of a sample, by which samples are filtered.

    Attributes:
        digest: Of its content, of `decisions.content_of`.
        type: `conversation`, ...; of a record its `type`, "" without.
        rejected: Whether the verifier rejects it.
        unknown: Whether the annotations say nothing about one of its claims.
        kept: Whether it is in `kept.jsonl`; None where there is no such file.
    """

    id: str
    digest: str
    type: str
    rejected: bool
    unknown: bool
    kept: bool | None = None


class Source(Protocol):
    """Samples to review."""

    name: str
    items: list[Item]

    def sample(self, number: int, turns: Sequence[EditedTurn] | None = None) -> Sample:
        """Return a sample with its checks; with edited turns, if any, verified once more.

        Raises:
            UserError: Turns of another number, or of a record whose text is between images.
        """

    def annotations(self, number: int) -> AnnotatedImage | None:
        """Return a sample's image with its boxes and captions, if they are known."""

    def images(self, number: int, sample: Sample) -> list[ImageView]:
        """Return the images of a sample, with their boxes."""

    def note(self, number: int) -> str:
        """Return what else belongs to a sample, e.g. a system prompt; "" for nothing."""


def sample_content(sample: Sample) -> str:
    """Return the digest of a sample's content."""
    texts = [text for turn in sample.turns for text in (turn.question, turn.answer)]
    return content_of(texts, [image.file_name for image in sample.images])


def record_content(record: Conversation) -> str:
    """Return the digest of a record's content, which is that of the sample it was exported from."""
    texts = [turn.text for turn in record.turns]
    return content_of(
        texts, [one if isinstance(one, bytes) else one.as_posix() for one in record.images]
    )


def has_unknown(sample: Sample) -> bool:
    """Return whether the annotations say nothing about a claim of the sample."""
    return any(c.verdict == "unknown" and c.rule not in NOT_CLAIMS for c in sample.checks)


def edited_turns(sample: Sample, turns: Sequence[EditedTurn]) -> tuple[Turn, ...]:
    """Return the turns of a sample with a reviewer's text.

    Raises:
        UserError: Their number is another one.
    """
    if len(turns) != len(sample.turns):
        raise UserError(
            f"sample {sample.id!r} has {len(sample.turns)} turns, and the edited text {len(turns)}"
        )
    return tuple(
        turn.model_copy(update={"question": new.question.strip(), "answer": new.answer.strip()})
        for turn, new in zip(sample.turns, turns, strict=True)
    )


def reverified(
    sample: Sample, turns: Sequence[EditedTurn], image: AnnotatedImage | None, policy: Policy | None
) -> Sample:
    """Return a sample with a reviewer's text, and what the annotations say of it.

    Args:
        sample: The sample before.
        turns: The text.
        image: With its annotations; None: there are none, and nothing is checked.
        policy: How strict; None likewise.

    Raises:
        UserError: The number of turns is another one, or the sample's operator has checks that need
            more than its image.
    """
    if sample.grown is not None and sample.grown.operator in OWN_CHECKS:
        raise UserError(
            f"sample {sample.id!r}: a text of the operator {sample.grown.operator!r} cannot be "
            "verified again after an edit; accept or reject it"
        )
    new = edited_turns(sample, turns)
    checks: tuple[Check, ...] = ()
    if image is not None and policy is not None:
        checks = check_sample(new, sample.type, image, sample.shown, policy)
    if sample.origin == "imported":
        checks = tuple(check for check in checks if check.rule != "citation")
    codes = reasons(checks)
    return sample.model_copy(
        update={
            "turns": new, "checks": checks, "judgment": None, "reasons": codes,
            "status": "rejected" if codes else "accepted",
        }
    )  # fmt: skip


class RunSamples:
    """The accepted and rejected samples of a run; only their facts stay in memory.

    Args:
        root: The run's folder.
        image_root: Folder of the images; None: that of the run's configuration.

    Raises:
        UserError: `verify` has not run, or the run has no configuration.
    """

    def __init__(self, root: Path, image_root: Path | None) -> None:
        refuse_older(root)
        folder = RunFolder(root)
        config = settings.load(InstructConfig, str(folder.config), [])
        self.name = str(root)
        self.items: list[Item] = []
        self._images = read_images(folder)
        self._policy = Policy(config.verify, read_categories(folder))
        self._root = Path(config.coco.images) if image_root is None else image_root
        self._links = config.coco.follow_symlinks
        self._places: list[tuple[Path, int, int]] = []
        kept: set[str] | None = None
        if folder.kept.exists():
            with open_regular(folder.kept) as file:
                kept = {Sample.model_validate_json(line).id for line in file}
        unread = 0
        for path in (folder.samples, folder.rejected):
            for sample, offset in _with_offsets(path):
                if not sample.turns:
                    unread += 1
                    continue
                self._places.append((path, offset, sample.image.id))
                self.items.append(
                    Item(
                        sample.id, sample_content(sample), sample.type,
                        sample.status == "rejected",
                        has_unknown(sample),
                        None if kept is None else sample.id in kept,
                    )
                )  # fmt: skip
        if unread:
            echo(f"left out: {unread:,} answers without turns, in which there is nothing to read")

    def sample(self, number: int, turns: Sequence[EditedTurn] | None = None) -> Sample:
        """See `Source`."""
        path, offset, _ = self._places[number]
        with path.open("rb") as file:
            file.seek(offset)
            sample = Sample.model_validate_json(file.readline())
        if sample.id != self.items[number].id:
            raise UserError(f"{path}: has changed since the review was started; start it again")
        if turns is None:
            return sample
        return reverified(sample, turns, self.annotations(number), self._policy)

    def annotations(self, number: int) -> AnnotatedImage | None:
        """See `Source`."""
        return self._images.get(self._places[number][2])

    def images(self, number: int, sample: Sample) -> list[ImageView]:
        """See `Source`."""
        views = []
        for of in sample.images:
            image = self._images.get(of.id) or AnnotatedImage(
                of.id, of.file_name, of.width, of.height, (), ()
            )
            try:
                image_path(self._root, image.file_name, follow_symlinks=self._links)
            except ImageError as error:
                views.append(ImageView("", str(error), image.width, image.height, (), (), 15))
                continue
            views.append(view_image(image, sample.shown, sample.checks, self._root, brief=False))
        return views

    def note(self, number: int) -> str:
        """See `Source`."""
        return ""


def _with_offsets(path: Path) -> Iterator[tuple[Sample, int]]:
    """Yield the samples of a file with the byte offsets of their lines.

    Raises:
        UserError: There is no such file, or a line is no sample.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file; give the folder of a run whose answers were verified, "
            "or --records",
            code="data_file_missing",
        ) from None
    with file:
        offset = 0
        for number, line in enumerate(file, 1):
            try:
                yield Sample.model_validate_json(line), offset
            except ValueError:
                raise UserError(
                    f"{path}:{number}: is not a sample; the file was damaged, run `verify` again",
                    code="json_syntax",
                ) from None
            offset += len(line)


class Annotations:
    """COCO's annotations by which claims of records are checked; without files, none are.

    Args:
        instances: COCO's boxes.
        captions: COCO's captions.

    Attributes:
        policy: How strict the checks are; None without annotations.
    """

    def __init__(self, instances: Path | None, captions: Path | None) -> None:
        self.policy: Policy | None = None
        self._finder = ImageFinder(())
        if instances is not None or captions is not None:
            index = read_coco(instances, captions)
            self.policy = Policy(VerifyConfig(), index.categories)
            self._finder = ImageFinder(index.images)

    def of(self, record: Conversation) -> AnnotatedImage | None:
        """Return the annotations of a record's only image, if it has them."""
        if len(record.images) != 1 or not isinstance(record.images[0], Path):
            return None
        return self._finder.find(record.images[0].name)


def record_sample(record: Conversation, known: Annotations) -> Sample:
    """Return a record as a sample, with its claims checked as far as annotations are known."""
    said = [turn.text.strip() for turn in record.turns if turn.role != "system"]
    turns = tuple(
        Turn(question=question, answer=answer, kind=kind_of(question))
        for question, answer in zip(said[::2], said[1::2], strict=True)
    )
    image = known.of(record)
    checks: tuple[Check, ...] = ()
    shown = Shown()
    if image is not None and known.policy is not None:
        found = check_sample(turns, type_of(turns), image, shown, known.policy)
        checks = tuple(check for check in found if check.rule != "citation")  # records cite nothing
        # All boxes are drawn, and named as on the pages of a run.
        boxes = tuple(box.id for box in image.boxes)
        shown = Shown(captions=image.caption_ids, boxes=boxes)
    source = ImageSource(id=image.id if image else 0, file_name="", width=1, height=1)
    return imported_sample(record.id, type_of(turns), source, turns, checks, shown)


class RecordFile:
    """Records of a file that training reads, with their claims checked if there are annotations.

    All records are in memory.

    Args:
        file: The records.
        instances: COCO's boxes; None: no boxes are drawn and no claims checked.
        captions: COCO's captions.

    Raises:
        UserError: A file cannot be read, or there is no usable record.
    """

    def __init__(self, file: DataFile, instances: Path | None, captions: Path | None) -> None:
        self.name = file.path
        self.items: list[Item] = []
        self._records: list[Conversation] = []
        self._known = Annotations(instances, captions)
        opened, raws = open_records(file), open_raw_records(Path(file.path), file).records
        times: Counter[str] = Counter()
        bad: Counter[str] = Counter()
        pairs = zip(opened.conversations, raws, strict=True)
        for record, raw in track(pairs, opened.total, f"reading {file.path}"):
            if not isinstance(record, Conversation):
                numbered_id(record.record_id, times)
                bad[record.reason] += 1
                continue
            value: Any = raw.value if isinstance(raw, RawRecord) else None
            named = value.get("type") if isinstance(value, dict) else None
            record = replace(record, id=numbered_id(record.id, times))
            self._records.append(record)
            sample = self._as_sample(record)
            self.items.append(
                Item(
                    record.id, record_content(record), named if isinstance(named, str) else "",
                    sample.status == "rejected",
                    has_unknown(sample),
                )
            )  # fmt: skip
        if bad:
            counted = ", ".join(f"{why} {number:,}" for why, number in bad.most_common())
            echo(f"left out: records that cannot be read: {counted}")

    def sample(self, number: int, turns: Sequence[EditedTurn] | None = None) -> Sample:
        """See `Source`."""
        record = self._records[number]
        if turns is None:
            return self._as_sample(record)
        edited_record(record, turns)  # refuses what `select` could not apply
        sample = self._as_sample(record)
        return reverified(sample, turns, self.annotations(number), self._known.policy)

    def annotations(self, number: int) -> AnnotatedImage | None:
        """See `Source`."""
        return self._known.of(self._records[number])

    def images(self, number: int, sample: Sample) -> list[ImageView]:
        """See `Source`."""
        from vlm_sft.data.images import upright_size

        record, views = self._records[number], []
        for source in record.images:
            name = source.name if isinstance(source, Path) else "embedded image"
            try:
                width, height, _ = upright_size(source)
            except ImageError as error:
                views.append(ImageView("", str(error), 4, 3, (), (), 15))
                continue
            known = self.annotations(number)
            image = known or AnnotatedImage(0, name, width, height, (), ())
            views.append(
                view_image(image, sample.shown, sample.checks, Path(), brief=False, source=source)
            )
        return views

    def note(self, number: int) -> str:
        """See `Source`."""
        turns = self._records[number].turns
        return f"System: {turns[0].text}" if turns[0].role == "system" else ""

    def _as_sample(self, record: Conversation) -> Sample:
        return record_sample(record, self._known)


def edited_record(record: Conversation, turns: Sequence[EditedTurn]) -> Conversation:
    """Return a record with a reviewer's text; images and the white space around texts stay.

    Raises:
        UserError: The number of turns is another one, or a changed text is in several pieces
            between images.
    """
    said = [turn for turn in record.turns if turn.role != "system"]
    texts = [text for turn in turns for text in (turn.question, turn.answer)]
    if len(texts) != len(said):
        raise UserError(
            f"record {record.id!r} has {len(said) // 2} turns, and the edited text {len(turns)}"
        )
    new = [_with_text(turn, text, record.id) for turn, text in zip(said, texts, strict=True)]
    system = [turn for turn in record.turns if turn.role == "system"]
    return replace(record, turns=(*system, *new))


def _with_text(turn: Said, text: str, record_id: str) -> Said:
    text = text.strip()
    if turn.text.strip() == text:
        return turn
    places = [i for i, part in enumerate(turn.parts) if isinstance(part, TextPart)]
    if len(places) > 1:
        raise UserError(
            f"record {record_id!r}: a text with images between its parts cannot be edited here; "
            "reject the record, or edit it in its file"
        )
    parts: list[TextPart | ImagePart] = list(turn.parts)
    if not places:
        return replace(turn, parts=(*parts, TextPart(text)))
    old = turn.text
    before, after = old[: len(old) - len(old.lstrip())], old[len(old.rstrip()) :]
    parts[places[0]] = TextPart(before + text + after)
    return replace(turn, parts=tuple(parts))
