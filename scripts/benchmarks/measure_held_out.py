"""Verification on answers that were written by hand and never tuned on.

    python scripts/benchmarks/measure_held_out.py RUN.yaml [KEY=VALUE ...]

Needs a run over the images that tests/data_tools/held_out_answers.json speaks of, indexed.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_tools.coco import AnnotatedImage
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.index import read_categories, read_images
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Shown, Turn
from data_tools.instruct.verify import Policy, check_sample, reasons
from vlm_sft.config import loading as settings

ANSWERS = Path(__file__).parent.parent.parent / "tests" / "data_tools" / "held_out_answers.json"


def main(argv: Sequence[str]) -> int:
    """Print what was judged rightly, and every answer that was not."""
    config = settings.load(InstructConfig, argv[0], argv[1:])
    folder = RunFolder(Path(config.output_dir))
    images = read_images(folder)
    policy = Policy(config.verify, read_categories(folder))
    for outcome, count in sorted(outcomes(images, policy).items()):
        print(f"{count:>4}  {outcome}")
    return 0


def outcomes(images: Mapping[int, AnnotatedImage], policy: Policy) -> Counter[str]:
    """How many were judged how; prints every answer that was judged wrongly."""
    counts: Counter[str] = Counter()
    for entry in json.loads(ANSWERS.read_text(encoding="utf-8")):
        turns = [Turn(question=q, answer=a, kind="object") for q, a in entry["turns"]]
        image = images[entry["image"]]
        codes = reasons(check_sample(turns, entry["type"], image, Shown(), policy))
        outcome = _outcome(set(entry["codes"]), set(codes))
        counts[outcome] += 1
        if outcome not in ("true, accepted", "false, rejected with the right code"):
            said = " / ".join(f"{q} {a}" for q, a in entry["turns"])
            print(f"{outcome}: {entry['image']} {entry['type']}: {said} -> {codes}")
    return counts


def _outcome(expected: set[str], found: set[str]) -> str:
    if not expected:
        return "true, rejected" if found else "true, accepted"
    if not found:
        return "false, accepted"
    return f"false, rejected with {'the right' if expected & found else 'another'} code"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
