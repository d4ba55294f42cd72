"""Accepted samples without repeats, and with no answer, opening or type outweighing the others.

Two passes over `samples.jsonl`: the first keeps a few numbers of each sample, from which all is
decided; the second writes `kept.jsonl` and `set_aside.jsonl`.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from data_tools.coco import AnnotatedImage
from data_tools.instruct.clean import images, near, steps
from data_tools.instruct.clean import split as receipts
from data_tools.instruct.clean.choices import Categories
from data_tools.instruct.clean.figures import Figures
from data_tools.instruct.clean.table import Reader, Table, TableBuilder, line_offsets
from data_tools.instruct.config import CleanConfig, InstructConfig
from data_tools.instruct.index import read_categories, read_images
from data_tools.instruct.lines import read_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Sample
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import owned_open, write_owned_json
from vlm_sft.utils.progress import track

__all__ = ["command"]


def command(config: InstructConfig) -> None:
    """Read `samples.jsonl`, write `kept.jsonl`, `set_aside.jsonl` and `cleaning.json`.

    Raises:
        UserError: A stage before has not run, or the samples are of other images.
    """
    folder = RunFolder(Path(config.output_dir))
    known = read_images(folder)
    table = _read(folder, config, known)
    with closing(Reader(folder.samples, table.offsets)) as reader:
        looks = _decide(table, reader, folder, config, known)
        figures = Figures(config.clean, table, known, looks)
        _write(folder, table, reader, figures)
    write_owned_json(folder.cleaning, figures.as_dict(folder))
    echo(figures.summary(), file=sys.stdout)


def _read(folder: RunFolder, config: InstructConfig, known: dict[int, AnnotatedImage]) -> Table:
    builder = TableBuilder(config.clean, Categories(read_categories(folder)), config.seed)
    samples = track(read_lines(folder.samples, Sample), description="reading samples")
    for sample, offset in zip(samples, line_offsets(folder.samples), strict=True):
        if sample.image.id not in known:
            raise UserError(
                f"{folder.samples}: sample {sample.id!r} is about image {sample.image.id}, "
                f"which {folder.images.name} does not have; run `index` and the stages after it"
            )
        builder.add(sample, offset)
    return builder.finished()


def _decide(
    table: Table,
    reader: Reader,
    folder: RunFolder,
    config: InstructConfig,
    known: dict[int, AnnotatedImage],
) -> images.Looks:
    looks = images.Looks({}, {}, 0)
    if config.clean.same_images.action == "set_aside":
        used = dict.fromkeys(table.images.tolist())
        paths = {number: Path(config.coco.images, known[number].file_name) for number in used}
        looks = images.look(paths, folder.image_hashes, config.clean.same_images)
        steps.mark_images(table, looks.repeats, looks.unreadable)
    if config.clean.near_duplicates is not None:
        near.mark_duplicates(table, reader, config.clean.near_duplicates)
    if config.clean.same_questions:
        steps.mark_questions(table)
    steps.mark_balance(table, config.clean, _category_numbers(config.clean, known))
    return looks


def _category_numbers(
    config: CleanConfig, known: dict[int, AnnotatedImage]
) -> dict[int, tuple[int, ...]]:
    if config.max_per_category is None:
        return {}
    numbers: dict[str, int] = {}
    return {
        image.id: tuple(numbers.setdefault(name, len(numbers)) for name in image.categories)
        for image in known.values()
    }


def _write(folder: RunFolder, table: Table, reader: Reader, figures: Figures) -> None:
    samples = track(read_lines(folder.samples, Sample), len(table), "writing samples")
    with ExitStack() as files:
        kept = files.enter_context(owned_open(folder.kept))
        aside = files.enter_context(owned_open(folder.set_aside))
        for before, after, lost in _outcomes(samples, table, reader):
            figures.count(before, after, lost)
            if after is not None:
                kept.write(after.model_dump_json().encode() + b"\n")
            for sample in lost:
                aside.write(sample.model_dump_json().encode() + b"\n")


def _outcomes(
    samples: Iterator[Sample], table: Table, reader: Reader
) -> Iterator[tuple[Sample, Sample | None, list[Sample]]]:
    for number, sample in enumerate(samples):
        after, lost = receipts.outcome(sample, number, table, lambda n: reader.sample(n).id)
        yield sample, after, lost
