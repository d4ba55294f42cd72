"""The long proof: every template and tokenizer on 10,000 generated conversations, in parallel.

    scripts/prove_masks                                   # all pairs
    scripts/prove_masks --conversations 500 --jobs 1      # a shorter look
    scripts/prove_masks --only vicuna_v1-sentencepiece    # one pair

Prints a table of conversations, tokens and violations, and the shortest conversation that broke a
mask, if one did; the exit code is then 1.
"""

import argparse
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.data.conversations_for_tests import conversations
from tests.data.mask_oracle import MAIN_PAIRS, OTHER_PAIRS, Pair, check
from tests.tokenizers_for_tests import missing
from vlm_sft.data.conversation import Conversation, TextPart
from vlm_sft.utils.progress import format_seconds, track

STEP = 250
"""Conversations between two signs of life."""


@dataclass(frozen=True)
class Proof:
    """What became of one pair."""

    pair: Pair
    conversations: int
    tokens: int
    refused: int
    """Conversations with text that the vocabulary cannot encode, refused as required."""
    violations: int
    shortest: str
    seconds: float


def prove(pair: Pair, count: int, number: int, steps: "multiprocessing.Queue[int]") -> Proof:
    """Generate conversations until `count` were looked at."""
    totals = {"seen": 0, "tokens": 0, "refused": 0, "violations": 0}
    shortest: tuple[int, str] = (sys.maxsize, "")
    start = time.monotonic()

    def look(conversation: Conversation) -> None:
        nonlocal shortest
        totals["seen"] += 1
        if totals["seen"] % STEP == 0:
            steps.put(STEP)
        try:
            tokens = check(pair, conversation)
        except Exception as error:
            totals["violations"] += 1
            size = sum(len(turn.text) for turn in conversation.turns)
            if size < shortest[0]:
                shortest = size, f"{written(conversation)}\n      {type(error).__name__}: {error}"
            return
        totals["tokens"] += tokens
        totals["refused"] += tokens == 0

    run = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )(given(conversations(pair))(look))
    seed(number)(run)()
    seconds = time.monotonic() - start
    return Proof(
        pair,
        totals["seen"],
        totals["tokens"],
        totals["refused"],
        totals["violations"],
        shortest[1],
        seconds,
    )


def written(conversation: Conversation) -> str:
    """The conversation on a line."""
    turns = [
        (t.role, t.supervised, [p.text if isinstance(p, TextPart) else p.index for p in t.parts])
        for t in conversation.turns
    ]
    return repr(turns)


def _work(arguments: tuple[Pair, int, int], steps: Any) -> Proof:
    return prove(*arguments, steps)


def _worker(tasks: Any, results: Any, steps: Any) -> None:
    while (task := tasks.get()) is not None:
        results.put(_work(task, steps))


def prove_all(pairs: Sequence[Pair], count: int, number: int, jobs: int) -> list[Proof]:
    """Every pair's proof, in the order of `pairs`."""
    context = multiprocessing.get_context("spawn")
    tasks, results, steps = context.Queue(), context.Queue(), context.Queue()
    for pair in pairs:
        tasks.put((pair, count, number))
    workers = [context.Process(target=_worker, args=(tasks, results, steps)) for _ in range(jobs)]
    for worker in workers:
        tasks.put(None)
        worker.start()
    proofs: dict[Pair, Proof] = {}

    def signs() -> Any:
        while len(proofs) < len(pairs):
            try:
                proof = results.get_nowait()
                proofs[proof.pair] = proof
            except queue.Empty:
                pass
            try:
                yield steps.get(timeout=0.5)
            except queue.Empty:
                if not any(worker.is_alive() for worker in workers) and results.empty():
                    break

    for _ in track(signs(), len(pairs) * (count // STEP), f"proving, {STEP} conversations a step"):
        pass
    for worker in workers:
        worker.join()
    lost = [pair.name for pair in pairs if pair not in proofs]
    if lost:
        raise SystemExit(f"error: no result for {', '.join(lost)}; a process died")
    return [proofs[pair] for pair in pairs]


def table(proofs: Sequence[Proof]) -> str:
    """Rows of figures for people."""
    rows = [("template", "tokenizer", "conversations", "tokens", "refused", "violations", "time")]
    for p in proofs:
        numbers = (p.conversations, p.tokens, p.refused, p.violations)
        shown = [f"{number:,}" for number in numbers]
        rows.append((p.pair.template, p.pair.tokenizer, *shown, format_seconds(p.seconds)))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prove_masks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--conversations", type=int, default=10_000, metavar="N", help="a pair")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--main", action="store_true", help="one tokenizer for each template")
    parser.add_argument("--only", action="append", metavar="TEMPLATE-TOKENIZER", default=[])
    arguments = parser.parse_args(argv)
    pairs = []
    for pair in MAIN_PAIRS if arguments.main else (*MAIN_PAIRS, *OTHER_PAIRS):
        if arguments.only and pair.name not in arguments.only:
            continue
        if missing(pair.tokenizer) is not None:
            print(f"{pair.name}: left out: {missing(pair.tokenizer)}", file=sys.stderr)
            continue
        pairs.append(pair)
    proofs = prove_all(pairs, arguments.conversations, arguments.seed, arguments.jobs)
    print(table(proofs))
    seen = sum(p.conversations for p in proofs)
    broken = sum(p.violations for p in proofs)
    print(
        f"\n{seen:,} conversations, {sum(p.tokens for p in proofs):,} tokens, {broken} violations"
    )
    for p in proofs:
        if p.violations:
            print(f"\n{p.pair.name}: {p.violations} violations, the shortest:\n   {p.shortest}")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
