"""`export`: write kept samples as training files that the trainer reads, with receipts."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final

from data_tools.digests import file_digest, hashed
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.lines import read_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Grown, Sample
from data_tools.records import IMAGE_MARK, JsonList, json_line, llava_record
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import owned_open, remove_owned, write_owned_json
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import read_json

FILES: Final = {"llava": "llava.json", "messages": "messages.jsonl", "parquet": "train.parquet"}
RECEIPTS: Final = "receipts.jsonl"

LICENSES: Final = {
    1: "CC BY-NC-SA 2.0",
    2: "CC BY-NC 2.0",
    3: "CC BY-NC-ND 2.0",
    4: "CC BY 2.0",
    5: "CC BY-SA 2.0",
    6: "CC BY-ND 2.0",
    7: "no known copyright restrictions",
    8: "United States Government work",
}
"""Names of COCO's license numbers, for annotations without names."""

_ROWS_AT_ONCE: Final = 1000

Turns = list[tuple[str, str]]
"""Questions with their answers."""

Write = Callable[[str, Sequence[str], Turns, str], None]
"""Writes a record with this id, image names, turns and type."""


def command(config: InstructConfig) -> None:
    """Read `kept.jsonl`, write the folder `export`: training files, receipts, `export.json`.

    Every file has the same conversations under the same ids, in the same order.

    Raises:
        UserError: `clean` has not run, or an id appears twice.
    """
    folder = RunFolder(Path(config.output_dir))
    before = _digests_before(folder.exports / "export.json")
    formats = config.export.formats
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("types", "origins", "models")}
    license_of: dict[int, int] = {}
    num_samples = num_turns = 0
    left_out = []
    seen: set[int] = set()
    several = _has_several_images(folder.kept)
    with ExitStack() as files:
        writers: list[Write] = []
        for name in formats:
            file = files.enter_context(owned_open(folder.exports / FILES[name]))
            writers.append(files.enter_context(_WRITERS[name](file, several)))
        receipts = files.enter_context(owned_open(folder.exports / RECEIPTS))
        for sample in track(read_lines(folder.kept, Sample), description="exporting samples"):
            if (digest := hashed(sample.id)) in seen:
                raise UserError(f"export: the id {sample.id!r} appears twice; run `clean` again")
            seen.add(digest)
            if any(IMAGE_MARK in turn.question for turn in sample.turns):
                left_out.append(sample.id)
                continue
            num_samples += 1
            num_turns += len(sample.turns)
            counts["types"][sample.type] += 1
            counts["origins"][sample.origin] += 1
            counts["models"][sample.model] += 1
            license_of.update({image.id: image.license or 0 for image in sample.images})
            turns = [(turn.question, turn.answer) for turn in sample.turns]
            names = [config.export.image_prefix + image.file_name for image in sample.images]
            for write in writers:
                write(sample.id, names, turns, sample.type)
            receipts.write(json_line(receipt(sample)))
    for old in FILES.keys() - set(formats):  # of an earlier export
        path = folder.exports / FILES[old]
        if not remove_owned(path) and path.is_file() and file_digest(path) == before.get(path.name):
            path.unlink()
    written = [*(FILES[name] for name in formats), RECEIPTS]
    known = _license_names(folder)
    summary = {
        "samples": num_samples,
        "turns": num_turns,
        "images": len(license_of),
        **{key: dict(sorted(found.items())) for key, found in counts.items()},
        "image_licenses": {
            known.get(str(number)) or LICENSES.get(number, "unknown"): count
            for number, count in sorted(Counter(license_of.values()).items())
        },
        "left_out": {"IMAGE_MARK_IN_QUESTION": left_out},
        "image_prefix": config.export.image_prefix,
        "files": {name: file_digest(folder.exports / name) for name in written},
    }
    write_owned_json(folder.exports / "export.json", summary)
    text = f"{folder.exports}: {num_samples:,} samples with {num_turns:,} turns about "
    text += f"{len(license_of):,} images in {', '.join(written)}"
    if left_out:
        text += f"\nleft out: {len(left_out):,} samples whose question contains {IMAGE_MARK!r}, "
        text += "which readers take for an image (listed in export.json)"
    echo(text, file=sys.stdout)


def receipt(sample: Sample) -> dict[str, Any]:
    """Return what a sample was made from and what it cost, without its text."""
    grown = sample.grown
    return {
        "id": sample.id,
        **({} if grown is None else _grown(grown)),
        "type": sample.type,
        "origin": sample.origin,
        "kinds": [turn.kind for turn in sample.turns],
        "image": sample.image.id,
        "license": sample.image.license,
        "request": sample.request,
        "template": sample.template,
        "template_sha256": sample.template_sha256,
        "model": sample.model,
        "fingerprint": sample.fingerprint,
        "parameters": sample.parameters,
        "cost": sample.cost.model_dump(mode="json"),
        "checks": dict(sorted(Counter(check.verdict for check in sample.checks).items())),
        **({"review": reviewed} if (reviewed := _reviewed(sample)) else {}),
        "judge": sample.judgment.verdict if sample.judgment else None,
        "evidence": sorted({number for check in sample.checks for number in check.evidence}),
        "tool": sample.tool,
    }


def _grown(grown: Grown) -> dict[str, Any]:
    """Return what a grown sample was made from; without what its operator does not have."""
    found = grown.model_dump(mode="json", exclude_defaults=True)
    return {"parents": list(grown.parents), **found}


def _has_several_images(path: Path) -> bool:
    """Return whether any line is about several images; texts have their quotes escaped."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return any(b'"operator":"multi-image"' in line for line in file)


def _reviewed(sample: Sample) -> list[str]:
    """Return what reviewers have decided about a sample, in words."""
    return [check.claim for check in sample.checks if check.rule == "review"]


# --- formats


@contextmanager
def _write_llava(file: IO[bytes], several: bool) -> Iterator[Write]:
    """Write a JSON list of LLaVA records, one per line."""
    records = JsonList(file)
    yield lambda *record: records.add(llava_record(*record))
    records.finish()


@contextmanager
def _write_messages(file: IO[bytes], several: bool) -> Iterator[Write]:
    """Write one object of messages per line, with content in parts.

    The text after an image begins with the newline that LLaVA puts after `<image>`, so that
    training sees the same tokens from every file.
    """

    def write(record_id: str, images: Sequence[str], turns: Turns, sample_type: str) -> None:
        messages: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(turns):
            parts = [{"type": "text", "text": question}]
            if number == 0:
                parts = []
                for image in images:
                    parts += [{"type": "image", "image": image}, {"type": "text", "text": "\n"}]
                parts[-1]["text"] += question
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        file.write(json_line({"id": record_id, "messages": messages, "type": sample_type}))

    yield write


@contextmanager
def _write_parquet(file: IO[bytes], several: bool) -> Iterator[Write]:
    """Write LLaVA records as columns: id, image, conversations, type.

    `image` is a name; in a file with records about several images, a list of names everywhere.
    """
    import pyarrow as pa
    from pyarrow import parquet

    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", pa.list_(pa.string()) if several else pa.string()),
            ("conversations", pa.list_(turn)),
            ("type", pa.string()),
        ]
    )
    rows: list[dict[str, Any]] = []
    with parquet.ParquetWriter(file, schema) as table:

        def write(record_id: str, images: Sequence[str], turns: Turns, sample_type: str) -> None:
            rows.append(llava_record(record_id, images, turns, sample_type))
            if several:
                rows[-1]["image"] = list(images)
            if len(rows) == _ROWS_AT_ONCE:
                table.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()

        yield write
        table.write_table(pa.Table.from_pylist(rows, schema))


_WRITERS: Final = {"llava": _write_llava, "messages": _write_messages, "parquet": _write_parquet}


def _digests_before(path: Path) -> Mapping[str, str]:
    """Return the digests by file name in the `export.json` of an earlier export."""
    try:
        files = read_json(path)["files"]
    except (OSError, UserError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


def _license_names(folder: RunFolder) -> dict[str, str]:
    """Return the names of the licenses by number from the annotations; none without an index."""
    index = read_json(folder.index) if folder.index.exists() else {}
    licenses = index.get("licenses") if isinstance(index, dict) else None
    return {
        number: license["name"]
        for number, license in (licenses if isinstance(licenses, dict) else {}).items()
        if isinstance(license, dict) and isinstance(license.get("name"), str)
    }
