"""How many wrong answers verification rejects, by kind of error, and how many true ones.

    python scripts/measure_recall.py CASES.jsonl [CASES.jsonl ...] [--misses]

Every line of a case file is one answer whose truth is known: `image_id`, `type`, `turns` (pairs of
question and answer), `truth` (`ok` or `contradicted`), `error` (the kind), `author`, and
`decidable_from_annotations`. Prints, for each file, a confusion matrix by type of answer, recall by
kind of error, and the codes that reject true answers. Wrong answers that boxes and captions cannot
decide are counted in a row of their own.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.coco import AnnotatedImage, read_coco
from data_tools.instruct.config import VerifyConfig
from data_tools.instruct.schema import Shown, Turn
from data_tools.instruct.verify import Policy, check_sample, reasons

CASES = Path(__file__).parent.parent / "tests" / "data_tools" / "verify_cases"
UNDECIDABLE = "not decidable"


@dataclass(frozen=True)
class Outcome:
    """A case with its verdict."""

    case: Mapping[str, Any]
    codes: tuple[str, ...]
    claims: tuple[str, ...]

    @property
    def rejected(self) -> bool:
        """Whether verification rejects the answer."""
        return bool(self.codes)

    @property
    def wrong(self) -> bool:
        """Whether the answer is wrong."""
        return self.case["truth"] != "ok"

    @property
    def kind(self) -> str:
        """The kind of error."""
        decidable = self.case.get("decidable_from_annotations", True)
        return (self.case["error"] or "other") if decidable else UNDECIDABLE


def main(argv: Sequence[str]) -> int:
    """Print the tables of every case file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="+", type=Path)
    parser.add_argument("--instances", type=Path, default=CASES / "instances.json")
    parser.add_argument("--captions", type=Path, default=CASES / "captions.json")
    parser.add_argument("--misses", action="store_true", help="list every wrong verdict")
    arguments = parser.parse_args(argv)
    index = read_coco(arguments.instances, arguments.captions)
    images = {image.id: image for image in index.images}
    policy = Policy(VerifyConfig(), index.categories)
    for path in arguments.cases:
        print_tables(path.name, outcomes(path, images, policy), arguments.misses)
    return 0


def outcomes(path: Path, images: Mapping[int, AnnotatedImage], policy: Policy) -> list[Outcome]:
    """Return the verdict on every case of a file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        turns = [Turn(question=q, answer=a, kind="object") for q, a in case["turns"]]
        checks = check_sample(turns, case["type"], images[case["image_id"]], Shown(), policy)
        claims = tuple(f"{check.code} {check.claim!r}" for check in checks if check.code)
        found.append(Outcome(case, reasons(checks), claims))
    return found


def print_tables(name: str, found: Sequence[Outcome], misses: bool) -> None:
    """Print the tables of one case file."""
    authors = Counter(str(outcome.case.get("author", "unknown")) for outcome in found)
    print(f"\n{name}: {len(found)} cases; written by {', '.join(sorted(authors))}")
    print_confusion(found)
    wrong = [outcome for outcome in found if outcome.wrong]
    print(f"\n  {'kind of error':<18} {'cases':>6} {'rejected':>9} {'recall':>8}")
    kinds = sorted(
        {outcome.kind for outcome in wrong}, key=lambda kind: (kind == UNDECIDABLE, kind)
    )
    for kind in kinds:
        _print_recall(kind, [outcome for outcome in wrong if outcome.kind == kind])
    _print_recall("all decidable", [outcome for outcome in wrong if outcome.kind != UNDECIDABLE])
    right = [outcome for outcome in found if not outcome.wrong]
    refused = Counter(code for outcome in right for code in outcome.codes)
    rejected = sum(outcome.rejected for outcome in right)
    print(f"\n  true answers rejected: {rejected} of {len(right)} ({_share(rejected, len(right))})")
    for code, count in refused.most_common():
        print(f"    {code} {count}")
    for outcome in found if misses else ():
        if outcome.rejected != outcome.wrong:
            turns = " / ".join(f"{q} {a}" for q, a in outcome.case["turns"])
            label = f"{outcome.kind} accepted" if outcome.wrong else "true, rejected"
            print(f"  {label}: {outcome.case['image_id']}: {turns} {'; '.join(outcome.claims)}")


def print_confusion(found: Sequence[Outcome]) -> None:
    """Print truth against verdict, by type of answer; undecidable cases are left out."""
    print(f"\n  {'type':<14} {'true accepted':>14} {'true rejected':>14} {'wrong accepted':>15} "
          f"{'wrong rejected':>15}")  # fmt: skip
    decidable = [o for o in found if not o.wrong or o.kind != UNDECIDABLE]
    for kind in ("conversation", "detail", "reasoning", "all"):
        of = [o for o in decidable if kind in ("all", o.case["type"])]
        cells = Counter((o.wrong, o.rejected) for o in of)
        print(f"  {kind:<14} {cells[False, False]:>14} {cells[False, True]:>14} "
              f"{cells[True, False]:>15} {cells[True, True]:>15}")  # fmt: skip


def _print_recall(kind: str, of: Sequence[Outcome]) -> None:
    rejected = sum(outcome.rejected for outcome in of)
    print(f"  {kind:<18} {len(of):>6} {rejected:>9} {_share(rejected, len(of)):>8}")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
