"""`clean`: drop duplicates, and balance answers, openings and types of the accepted samples.

Two passes over `samples.jsonl`, or over `reviewed.jsonl`, which has the decisions of reviewers
applied: the first reads a few numbers of each sample, by which everything is decided; the second
writes `kept.jsonl` and `dropped.jsonl`.
"""

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pandas as pd

from data_tools.coco import AnnotatedImage
from data_tools.instruct.clean.balance import balance, drop_repeated_questions
from data_tools.instruct.clean.choices import Categories
from data_tools.instruct.clean.near_duplicates import drop_near_duplicates
from data_tools.instruct.clean.review import apply_decisions
from data_tools.instruct.clean.same_images import SameImages, drop_same_images, find_same_images
from data_tools.instruct.clean.split import split_samples
from data_tools.instruct.clean.summary import summarize, summary_lines
from data_tools.instruct.clean.table import SampleFile, Table, line_offsets, read_table
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.index import read_categories, read_images
from data_tools.instruct.lines import read_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Sample
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import owned_open, remove_owned, write_owned_json
from vlm_sft.utils.progress import track


def command(config: InstructConfig) -> None:
    """Read `samples.jsonl`, write `kept.jsonl`, `dropped.jsonl` and `cleaning.json`.

    Raises:
        UserError: An earlier stage has not run, or the samples are about other images.
    """
    folder = RunFolder(Path(config.output_dir))
    known = read_images(folder)
    categories = Categories(read_categories(folder))
    path, codes, verdicts = apply_decisions(config, folder, known)
    table = read_table(_samples(path, folder, known), config.clean, categories, config.seed)
    if codes:
        table.samples["code"] = pd.Categorical(codes, table.samples["code"].cat.categories)
    with closing(SampleFile(path, table.samples["offset"].to_numpy())) as file:
        same = _decide(table, file, folder, config, known)
        samples = track(read_lines(path, Sample), len(table.samples), "writing samples")
        with owned_open(folder.kept) as kept_file, owned_open(folder.dropped) as dropped_file:
            for kept, dropped in split_samples(samples, table, lambda n: file.read(n).id):
                if kept is not None:
                    kept_file.write(kept.model_dump_json().encode() + b"\n")
                for sample in dropped:
                    dropped_file.write(sample.model_dump_json().encode() + b"\n")
        summary = summarize(config.clean, table, known, same, folder, file, path)
    if verdicts is not None:
        summary["review"] = verdicts.summary()
        echo(verdicts.lines(), file=sys.stdout)
    else:
        remove_owned(folder.reviewed)
    write_owned_json(folder.cleaning, summary)
    echo(summary_lines(summary), file=sys.stdout)


def _samples(
    path: Path, folder: RunFolder, known: dict[int, AnnotatedImage]
) -> Iterator[tuple[Sample, int]]:
    """Yield the accepted samples with their byte offsets."""
    samples = track(read_lines(path, Sample), description="reading samples")
    for sample, offset in zip(samples, line_offsets(path), strict=True):
        missing = next((image.id for image in sample.images if image.id not in known), None)
        if missing is not None:
            raise UserError(
                f"{path}: sample {sample.id!r} is about image {missing}, "
                f"which {folder.images.name} does not have; run `index` and the stages after it"
            )
        yield sample, offset


def _decide(
    table: Table,
    file: SampleFile,
    folder: RunFolder,
    config: InstructConfig,
    known: dict[int, AnnotatedImage],
) -> SameImages:
    """Decide what is dropped; return the images that look the same."""
    settings, same = config.clean, SameImages()
    if settings.same_images.action == "drop":
        paths = {image: Path(config.coco.images, known[image].file_name) for image in table.images}
        same = find_same_images(paths, folder.image_hashes, settings.same_images)
        drop_same_images(table, same)
    if settings.near_duplicates is not None:
        drop_near_duplicates(table, file, settings.near_duplicates)
    if settings.same_questions:
        drop_repeated_questions(table)
    balance(table, settings, {image.id: image.categories for image in known.values()})
    return same
