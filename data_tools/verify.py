"""Check conversations that others made against COCO boxes and captions, claim by claim.

Reads records of LLaVA's form and writes verdicts.jsonl, one line a record: the record's id,
`accepted` or `rejected`, the codes that reject it, and every claim with its verdict and the
annotation ids it rests on. A record that cannot be checked (another form, no image, an image
without annotations or without a file) is rejected with a code that says so. No model is used.
"""

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlm_sft.commands.parser import CommandParser
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo

if TYPE_CHECKING:
    from data_tools.instruct.schema import Check
    from data_tools.instruct.verify import Policy
    from data_tools.instruct.verify.llava_records import ImageFinder

KIND: Final = "verdicts"
"""What the marker of an output folder states that it holds."""
OUTPUT: Final = "verdicts.jsonl"

EXAMPLES = """examples:
  vlm-sft data verify --instances annotations/instances_train2017.json \\
      --captions annotations/captions_train2017.json --images train2017 \\
      --records llava_instruct_150k.json --out checked
  vlm-sft data verify --instances boxes.json --images images --records mine.jsonl --out checked
"""
WITHOUT_CAPTIONS: Final = (
    "captions were not given (--captions): the boxes alone decided, and claims that only captions "
    "settle are unknown"
)


def main(argv: Sequence[str]) -> int:
    """Check the records that `argv` names; return the exit code."""
    arguments = parser().read(argv)
    given = {name: getattr(arguments, name) for name in ("instances", "captions", "records")}
    files = {name: Path(path) for name, path in given.items() if path is not None}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path}: no such file", code="data_file_missing")
    images, out = Path(arguments.images), Path(arguments.out)
    if not images.is_dir():
        raise UserError(f"--images {images}: no such folder")

    from data_tools.coco import read_coco
    from data_tools.instruct.config import VerifyConfig
    from data_tools.instruct.verify import Policy
    from data_tools.instruct.verify.llava_records import ImageFinder
    from vlm_sft.utils.owned_files import own_output, owned_open

    own_output(
        out, KIND, [OUTPUT], inputs=[*files.values(), images], image_roots=[images],
        overwrite=arguments.overwrite,
    )  # fmt: skip
    index = read_coco(files["instances"], files.get("captions"))
    if not index.images:
        raise UserError(f"{files['instances']}: names no images to check records against")
    policy = Policy(VerifyConfig(), index.categories)
    finder = ImageFinder(index.images)
    # What is loaded stays until the end; full collections need not visit it again and again.
    gc.freeze()
    summary = Summary()
    with owned_open(out / OUTPUT) as file:
        for line in verdicts(files["records"], images, finder, policy, summary):
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        if not summary.records:
            raise UserError(f"{files['records']}: has no records", code="no_records")
    echo(summary.table(), file=sys.stdout)
    if "captions" not in files:
        echo(WITHOUT_CAPTIONS, file=sys.stdout)
    echo(f"\n{out / OUTPUT}", file=sys.stdout)
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft data verify", __doc__, EXAMPLES)
    parser.add_argument(
        "--instances", required=True, metavar="FILE", help="COCO's instances_*.json, with the boxes"
    )
    parser.add_argument(
        "--captions", metavar="FILE",
        help="COCO's captions_*.json; without them the boxes alone decide, and the summary says so",
    )  # fmt: skip
    parser.add_argument(
        "--images", required=True, metavar="DIR", help="the folder of the images' files"
    )
    parser.add_argument(
        "--records", required=True, metavar="FILE",
        help="records of LLaVA's form (`image`, `conversations` of `from` and `value`): a list in "
        ".json, one record a line in .jsonl, or .parquet. Records of another form, such as tables "
        "and `messages`, are not checked (RECORD_FORM). A record's `type` (conversation, detail, "
        "reasoning) is used where it is given, and guessed otherwise",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help=f"where {OUTPUT} is written")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"replace a {OUTPUT} that was edited or that this command did not write",
    )
    return parser


class Summary:
    """Counts of the records by type and verdict, and of the codes."""

    def __init__(self) -> None:
        self.records: Counter[tuple[str, str]] = Counter()
        self.codes: Counter[str] = Counter()
        self.claims: Counter[str] = Counter()

    def add(self, kind: str, line: dict[str, Any]) -> None:
        """Count a line of the output."""
        self.records[kind, line["verdict"]] += 1
        self.codes.update(line["codes"])
        self.claims.update(claim["verdict"] for claim in line["claims"])

    def table(self) -> str:
        """Return the table that the command prints."""
        lines = [f"{'type':<14} {'records':>9} {'accepted':>9} {'rejected':>9}"]
        kinds = sorted({kind for kind, _ in self.records}) or ["all"]
        for kind in [*kinds, *(["all"] if len(kinds) > 1 else [])]:
            counts = [
                sum(n for (k, v), n in self.records.items() if kind in ("all", k) and v == verdict)
                for verdict in ("accepted", "rejected")
            ]
            lines.append(f"{kind:<14} {sum(counts):>9,} {counts[0]:>9,} {counts[1]:>9,}")
        if self.codes:
            lines += ["", f"{'code':<20} {'records':>9}"]
            lines += [f"{code:<20} {n:>9,}" for code, n in self.codes.most_common()]
        claims = ", ".join(f"{name} {n:,}" for name, n in self.claims.most_common())
        return "\n".join([*lines, "", f"claims: {claims or 'none'}"])


def verdicts(
    records: Path,
    images: Path,
    finder: "ImageFinder",
    policy: "Policy",
    summary: Summary,
) -> Iterator[dict[str, Any]]:
    """Yield one line for each record of a file, in its order.

    Args:
        records: LLaVA records.
        images: Folder of the images.
        finder: The images of the annotation files.
        policy: How strict the checks are.
        summary: Counts the lines.
    """
    from data_tools.instruct.schema import SampleType, Shown
    from data_tools.instruct.verify import check_sample, reasons
    from data_tools.instruct.verify.llava_records import turns_of, type_of
    from vlm_sft.data.records import open_raw_records
    from vlm_sft.errors import RecordError
    from vlm_sft.utils.progress import track

    types: dict[str, SampleType] = {
        "conversation": "conversation", "detail": "detail", "reasoning": "reasoning",
    }  # fmt: skip
    raw_records = open_raw_records(records)
    for raw in track(raw_records.records, raw_records.total, f"checking {records.name}"):
        record: Any = None if isinstance(raw, RecordError) else raw.value
        turns = turns_of(record)
        name = record.get("image") if isinstance(record, dict) else None
        image = finder.find(name) if isinstance(name, str) else None
        if turns is None:
            kind, line = "not checked", _unchecked(record, "RECORD_FORM")
        elif image is None:
            code = "IMAGE_NOT_ANNOTATED" if name else "NO_IMAGE"
            kind, line = "not checked", _unchecked(record, code)
        elif not any(
            os.path.exists(images / part)
            for part in (str(name), os.path.basename(str(name)), image.file_name)
        ):
            kind, line = "not checked", _unchecked(record, "IMAGE_MISSING")
        else:
            sample_type = types.get(str(record.get("type"))) or type_of(turns)
            checks = check_sample(turns, sample_type, image, Shown(), policy)
            codes = list(reasons(checks))
            kind, line = sample_type, {
                "id": record.get("id"),
                "verdict": "rejected" if codes else "accepted",
                "codes": codes,
                "claims": [_claim(check) for check in checks if check.rule != "citation"],
            }  # fmt: skip
        summary.add(kind, line)
        yield line


def _unchecked(record: Any, code: str) -> dict[str, Any]:
    from data_tools.instruct.verify.llava_records import is_unicode

    known = record.get("id") if isinstance(record, dict) else None
    if not is_unicode(known):
        known = str(known).encode("utf-8", "backslashreplace").decode()
    return {"id": known, "verdict": "rejected", "codes": [code], "claims": []}


def _claim(check: "Check") -> dict[str, Any]:
    """Return a finding as it is written: without what is not known of it."""
    found = {
        "rule": check.rule, "verdict": check.verdict, "code": check.code, "turn": check.turn,
        "part": check.part, "span": check.span, "claim": check.claim,
        "evidence": check.evidence or None,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


if __name__ == "__main__":
    run_command(main)
