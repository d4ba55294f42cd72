"""How many wrong and true answers a judge (`verify.judge`) rejects, next to the rules.

    python scripts/measure_judge.py --judge judge.yaml --out DIR CASES.jsonl [CASES.jsonl ...]

`judge.yaml` has the settings of `verify.judge`: `model`, `base_url`, and so on. The cases are
those of `measure_recall.py`. The requests are the ones that `verify` sends, in the run `DIR/judge`:
answers are recorded as they come, and a repeated command asks only for those that are missing.
Prints for each file what is rejected by the rules, by statements that the judge lists as
contradicted, by any statement that it lists, and by the rules or a contradicted statement.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from measure_recall import CASES, UNDECIDABLE

from data_tools.coco import AnnotatedImage, read_coco
from data_tools.instruct.config import (
    CocoConfig,
    InstructConfig,
    JudgeConfig,
    TeacherConfig,
    VerifyConfig,
)
from data_tools.instruct.schema import Sample, Shown, Turn
from data_tools.instruct.verify import Policy, check_sample
from data_tools.instruct.verify.command import image_source
from data_tools.instruct.verify.judge import Judge
from data_tools.instruct.verify.llava_records import imported_sample
from vlm_sft.commands.run_command import run_command
from vlm_sft.config.loading import load

COLUMNS: Final = ("rules", "contradicted", "anything", "rules or contradicted")


@dataclass(frozen=True)
class Judged:
    """A case with the verdicts on it: by which of the columns it is rejected."""

    case: Mapping[str, Any]
    verdict: str
    rejected: tuple[bool, ...]

    @property
    def kind(self) -> str:
        """The kind of error; `true` for a true answer."""
        if self.case["truth"] == "ok":
            return "true"
        return self.case["error"] if self.case["decidable_from_annotations"] else UNDECIDABLE


def main(argv: Sequence[str]) -> int:
    """Ask about every case, print a table for each file, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="measure_judge", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="+", type=Path)
    parser.add_argument("--judge", type=Path, required=True, help="YAML file: `verify.judge`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the judge's run")
    parser.add_argument("--instances", type=Path, default=CASES / "instances.json")
    parser.add_argument("--captions", type=Path, default=CASES / "captions.json")
    parser.add_argument("--misses", action="store_true", help="list the wrong verdicts")
    arguments = parser.parse_args(argv)
    index = read_coco(arguments.instances, arguments.captions)
    images = {image.id: image for image in index.images}
    config = InstructConfig(
        output_dir=str(arguments.out),
        coco=CocoConfig(images="."),
        teacher=TeacherConfig(kind="rules"),
        verify=VerifyConfig(judge=load(JudgeConfig, arguments.judge)),
    )
    judge = Judge(config, images, index.categories)
    policy = Policy(config.verify, index.categories)
    files = {path: cases_of(path, images, policy) for path in arguments.cases}
    code = judge.ask(sample for cases in files.values() for _, sample in cases)
    for path, cases in files.items():
        judged = judge.judged(sample for _, sample in cases)
        found = [verdicts(case, sample) for (case, _), sample in zip(cases, judged, strict=True)]
        print_table(path.name, found, arguments.misses)
    return code


def cases_of(
    path: Path, images: Mapping[int, AnnotatedImage], policy: Policy
) -> list[tuple[dict[str, Any], Sample]]:
    """Return the cases of a file, each with its sample as the rules see it."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        case = json.loads(line)
        image = images[case["image_id"]]
        turns = tuple(Turn(question=q, answer=a, kind="object") for q, a in case["turns"])
        checks = check_sample(turns, case["type"], image, Shown(), policy)
        sample_id = f"{path.stem}-{number}"
        sample = imported_sample(sample_id, case["type"], image_source(image), turns, checks)
        found.append((case, sample))
    return found


def verdicts(case: Mapping[str, Any], sample: Sample) -> Judged:
    """Return a case with what rejects it, in the order of `COLUMNS`."""
    assert sample.judgment is not None  # its turns are not empty
    listed = {objection.verdict for objection in sample.judgment.objections}
    rules, contradicted = bool(sample.reasons), "contradicted" in listed
    rejected = (rules, contradicted, bool(listed), rules or contradicted)
    return Judged(case, sample.judgment.verdict, rejected)


def print_table(name: str, found: Sequence[Judged], misses: bool) -> None:
    """Print what each column rejects of each kind of error and of the true answers."""
    missing = sum(judged.verdict in ("unreadable", "refused", "unanswered") for judged in found)
    print(f"\n{name}: {len(found)} cases, {missing} without a verdict of the judge")
    print(f"\n  {'rejected by':<20} {'cases':>5}" + "".join(f" {name:>22}" for name in COLUMNS))
    wrong = [judged for judged in found if judged.kind not in ("true", UNDECIDABLE)]
    for kind in sorted({judged.kind for judged in wrong}):
        _print_row(kind, [judged for judged in wrong if judged.kind == kind])
    _print_row("all decidable", wrong)
    for kind in (UNDECIDABLE, "true"):
        _print_row(kind, [judged for judged in found if judged.kind == kind])
    for judged in found if misses else ():
        if judged.rejected[-1] == (judged.kind == "true"):
            turns = " / ".join(f"{q} {a}" for q, a in judged.case["turns"])
            print(f"  {judged.kind}, {judged.verdict}: {judged.case['image_id']}: {turns}")


def _print_row(kind: str, of: Sequence[Judged]) -> None:
    cells = []
    for column in range(len(COLUMNS)):
        count = sum(judged.rejected[column] for judged in of)
        cells.append(f"{count} ({count / len(of):.1%})" if of else "-")
    print(f"  {kind:<20} {len(of):>5}" + "".join(f" {cell:>22}" for cell in cells))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
