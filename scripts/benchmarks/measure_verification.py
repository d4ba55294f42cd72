"""How well verification tells true from false, with figures: human captions, mutations, rules.

    python scripts/benchmarks/measure_verification.py RUN.yaml [KEY=VALUE ...] [--misses]

Needs a run that has been indexed; its `samples.jsonl` are taken as true where the rules teacher
wrote them. Prints

- human captions, each held against the boxes and all captions, and against the boxes and the other
  captions only (harder than any use: nothing but four people's words and the boxes);
- mutations of true samples: rejected with the right code, with another, or accepted.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import mutate_samples
from msgspec.structs import replace
from mutate_samples import AnswerMutant, Mutant

from data_tools.coco import AnnotatedImage
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.generate.answers import answers_folder, read_answers
from data_tools.instruct.index import read_categories, read_images
from data_tools.instruct.lines import read_lines
from data_tools.instruct.plan.command import read_requests
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Check, Sample, Shown, Turn
from data_tools.instruct.verify import Policy, check_sample, reasons
from data_tools.instruct.verify.codes import CODES
from vlm_sft.config import loading as settings

QUESTION = "Describe the picture."


def main(argv: Sequence[str]) -> int:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--misses", action="store_true", help="list what was judged wrongly")
    arguments = parser.parse_args(argv)
    config = settings.load(InstructConfig, arguments.config, arguments.overrides)
    folder = RunFolder(Path(config.output_dir))
    images = read_images(folder)
    policy = Policy(config.verify, read_categories(folder))
    print_captions(images.values(), policy, arguments.misses)
    samples = list(read_lines(folder.samples, Sample))
    answers = read_answers(answers_folder(config))
    mutants: list[Mutant | AnswerMutant] = []
    mutants += mutate_samples.mutants(samples, images, policy.lexicon.categories)
    mutants += mutate_samples.caption_mutants(images.values(), policy.lexicon.categories)
    mutants += mutate_samples.answer_mutants(read_requests(folder), answers)
    print_mutants(mutants, images, policy, arguments.misses)
    return 0


def print_captions(images: Collection[AnnotatedImage], policy: Policy, misses: bool) -> None:
    """Human captions as descriptions; which are rejected, and as what."""
    for name, alone in (("boxes and all captions", False), ("boxes and the other captions", True)):
        total, found = 0, []
        for image in images:
            for index in range(len(image.captions)):
                total += 1
                checks = check_caption(image, index, policy, leave_out=alone)
                refused = [check for check in checks if check.code is not None]
                if refused:
                    found.append((image.id, image.captions[index], refused))
        contradicted = [f for f in found if any(is_false(check) for check in f[2])]
        codes = Counter(code for _, _, refused in found for code in reasons(refused))
        print(f"\nhuman captions against {name}: {total}")
        print(f"  rejected as contradicted: {len(contradicted)} ({len(contradicted) / total:.1%})")
        print(f"  rejected at all:          {len(found)} ({len(found) / total:.1%}) {dict(codes)}")
        for number, caption, refused in found if misses else ():
            claims = "; ".join(f"{c.code} {c.verdict} {c.claim!r}" for c in refused)
            print(f"    {number}: {caption} -> {claims}")


def check_caption(
    image: AnnotatedImage, index: int, policy: Policy, *, leave_out: bool
) -> tuple[Check, ...]:
    """A human caption as the answer to a request for a description."""
    known = image
    if leave_out:
        known = replace(
            image,
            captions=_without(image.captions, index),
            caption_ids=_without(image.caption_ids, index),
        )
    turn = Turn(question=QUESTION, answer=image.captions[index], kind="description")
    return check_sample((turn,), "detail", known, Shown(), policy)


def is_false(check: Check) -> bool:
    """Whether a check rejects because the annotations say otherwise."""
    content = check.code is not None and CODES[check.code].family == "content"
    return content and check.verdict == "contradicted"


def print_mutants(
    mutants: Sequence[Mutant | AnswerMutant],
    images: dict[int, AnnotatedImage],
    policy: Policy,
    misses: bool,
) -> None:
    """For every mutation: what became of its samples."""
    outcomes: dict[str, Counter[str]] = {}
    codes: dict[str, Counter[str]] = {}
    missed: list[str] = []
    for mutant in mutants:
        found = judge(mutant, images, policy)
        right = bool(mutant.expected & set(found))
        outcome = "right" if right else "other" if found else "accepted"
        outcomes.setdefault(mutant.mutation, Counter())[outcome] += 1
        codes.setdefault(mutant.mutation, Counter()).update(found or ("accepted",))
        if not right:
            missed.append(f"{mutant.mutation}: {mutant.describe()} -> {found or 'accepted'}")
    print(f"\n{'mutation':<16} {'mutants':>8} {'right':>8} {'other':>8} {'accepted':>9}   codes")
    for name, counts in outcomes.items():
        _print_row(name, counts, codes[name])
    total = sum(outcomes.values(), Counter())
    _print_row("all", total, Counter())
    print("\n".join(missed if misses else []))


def judge(
    mutant: Mutant | AnswerMutant, images: dict[int, AnnotatedImage], policy: Policy
) -> tuple[str, ...]:
    """The codes that reject a mutant; empty where it is accepted."""
    return mutant.judge(images[mutant.image], policy)


def _print_row(name: str, counts: Counter[str], codes: Counter[str]) -> None:
    total = counts.total()
    shares = " ".join(
        f"{counts[outcome] / total:>8.1%}" for outcome in ("right", "other", "accepted")
    )
    shown = ", ".join(f"{code} {n}" for code, n in codes.most_common(6))
    print(f"{name:<16} {total:>8} {shares}    {shown}")


def _without(values: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    return values[:index] + values[index + 1 :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
