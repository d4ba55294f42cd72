"""The contents of `build_coco`'s files: what the rules write and the verifier accepts."""

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from data_tools.coco import AnnotatedImage, CocoIndex
from data_tools.instruct.config import TurnsConfig, VerifyConfig
from data_tools.instruct.verify import Policy, check_sample, reasons
from data_tools.records import JsonList, llava_record
from data_tools.rules import Family, families
from data_tools.rules.conversation import conversation
from data_tools.rules.existence import Balanced
from data_tools.rules.facts import Facts
from data_tools.rules.phrases import AnswerStyle, Exchange, Speaker
from vlm_sft.utils.progress import track

CAPTIONS, TURNS, PROBES = 1, 2, 3
"""Purposes of an image's random numbers; each has a generator of its own."""
VERIFY: Final = VerifyConfig(
    forms={"conversation": TurnsConfig(turns=(1, 100), answer_words=(1, 1000))}
)
LEAST_SHARE: Final = 0.02
"""Answers rarer than this share of a kind are left out: balance would leave hardly any other."""


@dataclass
class Output:
    """What one file will hold, and what the summary says about it.

    Attributes:
        rejected: Codes of the answers that were left out (docs/instruction-data/verification.md).
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)

    def data(self) -> bytes:
        """Return the file's content."""
        file = io.BytesIO()
        listed = JsonList(file)
        for record in self.records:
            listed.add(record)
        listed.finish()
        return file.getvalue()

    def summary(self) -> dict[str, Any]:
        """Return counts by family, kind and answer, and how well existence is guessed by name."""
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for exchange in self.exchanges:
            if exchange.answer:
                answers[exchange.kind][exchange.answer] += 1
        found: dict[str, Any] = {
            "records": len(self.records),
            "questions": len(self.exchanges),
            "families": dict(sorted(Counter(e.family for e in self.exchanges).items())),
            "answers": {kind: dict(sorted(count.items())) for kind, count in answers.items()},
            "rejected": dict(sorted(self.rejected.items())),
        }
        existence = [e for e in self.exchanges if e.family == "existence"]
        if existence:
            found["existence_by_category_alone"] = round(_best_by_category(existence), 4)
        return found


class Writer:
    """Makes the questions and answers of each file, and leaves out what the verifier rejects.

    Images are given in one fixed order: which absent category is asked for depends on what was
    asked before, so that no category's name gives the answer away.
    """

    def __init__(self, index: CocoIndex, seed: int, style: AnswerStyle) -> None:
        self._index, self._seed, self._style = index, seed, style
        self._policy = Policy(VERIFY, index.categories)
        self._existence = Balanced(index)

    def stage1(
        self, images: Sequence[AnnotatedImage], *, from_boxes: bool, limit: int | None
    ) -> Output:
        """Return caption pairs, a record each, at most `limit` of an image."""
        output = Output()
        for image in track(images, description="building stage1"):
            facts, speaker = Facts(image), self._speaker(image, CAPTIONS)
            if from_boxes:
                pairs = families.caption_of_boxes(facts, speaker)
            else:
                pairs = families.captions(facts, speaker, limit)
            kept = [e for pair in pairs for e in self._accepted(facts, [pair], output)]
            _add(output, image, "caption", [[exchange] for exchange in kept])
        return output

    def stage2(
        self, images: Sequence[AnnotatedImage], turns: int, wanted: Collection[Family]
    ) -> Output:
        """Return a conversation of about `turns` questions for each image with known content."""
        output = Output()
        for image in track(images, description="building stage2"):
            facts, speaker = Facts(image), self._speaker(image, TURNS)
            exchanges = conversation(facts, speaker, self._existence.ask, turns, wanted)
            # A second question after evidence would be answered by reading, not by looking.
            apart = self._style == "evidence"
            parts = [[e] for e in exchanges] if apart else [exchanges]
            kept = [self._accepted(facts, part, output) for part in parts]
            _add(output, image, "conversation", [part for part in kept if part])
        return output

    def probes(self, family: str, images: Sequence[AnnotatedImage], per_image: int) -> Output:
        """Return single questions of one family, balanced, at most `per_image` of an image."""
        output, existence = Output(), Balanced(self._index)
        ask: dict[str, Callable[[Facts, Speaker], list[Exchange]]] = {
            "existence": lambda facts, speaker: existence.ask(
                facts, speaker, max(1, per_image // 2)
            ),
            "counting": families.counting,
            "halves": families.halves,
        }
        found = {}
        for image in track(images, description=f"building {family}"):
            facts = Facts(image)
            asked = ask[family](facts, self._speaker(image, PROBES))
            found[image.id] = [e for one in asked for e in self._accepted(facts, [one], output)]
        if family != "existence":  # which has as many yes as no
            found = _levelled(found, per_image, np.random.default_rng([self._seed, PROBES]))
        for image in images:
            for number, exchange in enumerate(found[image.id]):
                output.records.append(
                    {
                        "id": f"{image.id:012d}-{family}-{number}",
                        "image": image.file_name,
                        "question": exchange.question,
                        "answer": exchange.answer,
                        "category": exchange.category,
                        "kind": exchange.kind,
                    }
                )
                output.exchanges.append(exchange)
        return output

    def _speaker(self, image: AnnotatedImage, purpose: int) -> Speaker:
        rng = np.random.default_rng([self._seed, image.id, purpose])
        return Speaker(rng, self._style)

    def _accepted(
        self, facts: Facts, exchanges: Sequence[Exchange], output: Output
    ) -> list[Exchange]:
        """Return the exchanges of one record that the verifier accepts; count why others go."""
        turns = [exchange.turn for exchange in exchanges]
        if not turns:
            return []
        checks = check_sample(turns, "conversation", facts.image, facts.shown, self._policy)
        output.rejected.update(reasons(checks))
        rejected = {check.turn for check in checks if check.code is not None}
        if None in rejected:  # the record as a whole
            return []
        return [exchange for i, exchange in enumerate(exchanges) if i not in rejected]


def _add(
    output: Output, image: AnnotatedImage, label: str, records: Sequence[Sequence[Exchange]]
) -> None:
    for number, exchanges in enumerate(records):
        turns = [(exchange.question, exchange.reply) for exchange in exchanges]
        record_id = f"{image.id:012d}-{label}-{number}"
        output.records.append(llava_record(record_id, image.file_name, turns))
        output.exchanges.extend(exchanges)


def _levelled(
    found: dict[int, list[Exchange]], per_image: int, rng: np.random.Generator
) -> dict[int, list[Exchange]]:
    """Return at most `per_image` of each image, equally many of every answer of a kind."""
    import pandas as pd  # takes half a second

    from data_tools.instruct.clean.balance import above_limit

    drawn = [
        (image_id, exchanges[i])
        for image_id, exchanges in found.items()
        for i in rng.permutation(len(exchanges))[:per_image]
    ]
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for _, exchange in drawn:
        kinds[exchange.kind][exchange.answer] += 1
    limits: dict[tuple[str, str], int] = {}
    for kind, answers in kinds.items():
        common = {a: n for a, n in answers.items() if n >= LEAST_SHARE * answers.total()}
        # A kind with one answer alone measures nothing.
        quota = min(common.values()) if len(common) > 1 else 0
        limits |= {(kind, answer): quota if answer in common else 0 for answer in answers}
    numbers = {key: number for number, key in enumerate(limits)}
    keys = np.array([numbers[e.kind, e.answer] for _, e in drawn], np.int64)
    order = rng.integers(2**63, size=len(drawn), dtype=np.uint64)
    rows = pd.DataFrame({"key": keys, "order": order})
    beyond = set(above_limit(rows, "key", pd.Series(list(limits.values()))))
    kept: dict[int, list[Exchange]] = {image_id: [] for image_id in found}
    for row, (image_id, exchange) in enumerate(drawn):
        if row not in beyond:
            kept[image_id].append(exchange)
    return kept


def _best_by_category(exchanges: Sequence[Exchange]) -> float:
    """Return the accuracy of guessing each category's commoner answer without the image."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for exchange in exchanges:
        counts[exchange.category][exchange.answer] += 1
    return sum(max(count.values()) for count in counts.values()) / len(exchanges)
