"""The outcome of each image and request of a run: in the training files, or the reason why not."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from data_tools.findings import KINDS
from data_tools.instruct.plan.command import LEFT_OUT
from data_tools.instruct.report.results import OUTCOMES, Outcome, Result

FILES: Final[Mapping[Outcome, str]] = {
    "unanswered": "failures.jsonl",
    "rejected": "rejected.jsonl",
    "dropped": "dropped.jsonl",
}
"""Where the samples or requests of an outcome are listed."""

_MOST_REASONS: Final = 4


class Row(NamedTuple):
    """An outcome with its numbers; `details` says why, with counts or with the setting."""

    outcome: str
    images: int
    requests: int
    details: str


class Outcomes:
    """Counts by outcome. An image counts where the request that got furthest ended."""

    def __init__(self) -> None:
        self._furthest: dict[int, int] = {}
        self._requests: Counter[Outcome] = Counter()
        self._reasons: dict[Outcome, Counter[str]] = defaultdict(Counter)

    def add(self, result: Result) -> None:
        """Count one request."""
        image, outcome = result.request.image, result.outcome
        rank = list(OUTCOMES).index(outcome)
        self._furthest[image] = max(rank, self._furthest.get(image, 0))
        self._requests[outcome] += 1
        reasons = result.reasons
        if outcome == "unanswered":
            reasons = (_in_words(reasons[0] if reasons else ""),)
        self._reasons[outcome].update(reasons)

    @property
    def num_images(self) -> int:
        """Images with a request."""
        return len(self._furthest)

    def rows(self, index: Mapping[str, Any], plan: Mapping[str, Any]) -> list[Row]:
        """Return the outcomes that occur, from the training files back to the annotations.

        Args:
            index: Content of `index.json`, empty if there is none.
            plan: Content of `plan.json`, empty if there is none.
        """
        images = Counter(self._furthest.values())
        rows = []
        for rank, (outcome, words) in reversed(list(enumerate(OUTCOMES.items()))):
            details = _listed(self._reasons[outcome])
            if details and outcome in FILES:
                details += f" ({FILES[outcome]})"
            rows.append(Row(words, images[rank], self._requests[outcome], details))
        lists = plan.get("guard", {}).get("lists", {})
        met = +Counter({name: of["overlap"] for name, of in lists.items()})
        for key, count in plan.get("left_out", {}).items():
            words, hint = LEFT_OUT.get(key, (key.replace("_", " "), ""))
            reasons = _listed(met) if key == "of_evaluations" else ""
            rows.append(Row(words, count, 0, "; ".join(filter(None, (reasons, hint)))))
        for kind, finding in index.get("findings", {}).items():
            if kind in KINDS and KINDS[kind].consequence == "image dropped":
                rows.append(Row(KINDS[kind].meaning, finding["count"], 0, ""))
        return [row for row in rows if row.images or row.requests]


def outcome_lines(rows: list[Row]) -> Iterator[str]:
    """Yield the table for a terminal."""
    yield f"{'images':>8} {'requests':>9}  outcome"
    for row in rows:
        requests = f"{row.requests:,}" if row.requests else "-"
        details = f": {row.details}" if row.details else ""
        yield f"{row.images:>8,} {requests:>9}  {row.outcome}{details}"


def _listed(reasons: Counter[str]) -> str:
    counted = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    more = f", {len(counted) - _MOST_REASONS} more" if len(counted) > _MOST_REASONS else ""
    return ", ".join(f"{reason} {n:,}" for reason, n in counted[:_MOST_REASONS]) + more


def _in_words(failure: str) -> str:
    """Return why a request has no answer."""
    if failure == "nothing_to_say":
        return "rules find nothing certain to say (a model as teacher may)"
    return f"failed: {failure}" if failure else "not asked yet"
