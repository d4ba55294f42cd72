"""Count where the judge (`verify.judge`) and the rules agree; it decides nothing."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from rich.table import Table

from data_tools.instruct.schema import Sample, SampleType

EXAMPLES: Final = 5
"""Samples that are named for each kind of disagreement."""
WITH_VERDICT: Final = ("supported", "unsupported", "contradicted")
WITHOUT_VERDICT: Final = ("unreadable", "refused", "unanswered")
RULES: Final = ("accepted", "rejected")
_JUDGE: Final = "JUDGE_"
"""Beginning of the codes that the judge itself rejects with."""


class Agreement:
    """Counts of samples by the verdict of the rules and of the judge."""

    def __init__(self) -> None:
        self.cells: Counter[tuple[SampleType, str, str]] = Counter()
        self.by_code: dict[str, Counter[str]] = {}
        self.models: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.usd = 0.0
        self.examples: dict[str, list[dict[str, str]]] = {}
        self._judged: set[str] = set()

    def add(self, sample: Sample) -> None:
        """Count a sample that the judge was asked about."""
        judgment = sample.judgment
        if judgment is None:
            return
        codes = [code for code in sample.reasons if not code.startswith(_JUDGE)]
        codes += judgment.overruled
        rules = "rejected" if codes else "accepted"
        self.cells[sample.type, rules, judgment.verdict] += 1
        for code in codes:
            self.by_code.setdefault(code, Counter())[judgment.verdict] += 1
        if judgment.cost is not None and judgment.request not in self._judged:
            self._judged.add(judgment.request)
            self.models[judgment.model] += 1
            self.tokens["in"] += judgment.cost.tokens_in
            self.tokens["out"] += judgment.cost.tokens_out
            self.usd += judgment.cost.usd or 0.0
        if judgment.verdict in WITHOUT_VERDICT:
            self._example(judgment.verdict, sample, judgment.note)
        elif (judgment.verdict == "supported") != (rules == "accepted"):
            claims = [objection.statement for objection in judgment.objections] or codes
            self._example(f"{rules} by the rules, {judgment.verdict}", sample, claims[0])

    def _example(self, kind: str, sample: Sample, claim: str) -> None:
        known = self.examples.setdefault(kind, [])
        if len(known) < EXAMPLES:
            known.append({"sample": sample.id, "claim": " ".join(claim.split())})

    def count(self, rules: str, judge: str, sample_type: SampleType | None = None) -> int:
        """Return the number of samples with these verdicts."""
        return sum(
            number
            for (found, by_rules, by_judge), number in self.cells.items()
            if (by_rules, by_judge) == (rules, judge) and sample_type in (None, found)
        )

    @property
    def asked(self) -> int:
        """Return samples that the judge was asked about."""
        return self.cells.total()

    @property
    def with_verdict(self) -> int:
        """Return samples that it has a verdict on."""
        return sum(self.count(rules, judge) for rules in RULES for judge in WITH_VERDICT)

    @property
    def agreeing(self) -> int:
        """Return samples that both accept or both object to; never those without a verdict."""
        objected = sum(self.count("rejected", judge) for judge in WITH_VERDICT[1:])
        return self.count("accepted", "supported") + objected

    def summary(self, decides: bool | str) -> dict[str, Any]:
        """Return the content of `judge` in `verification.json`."""
        types = sorted({sample_type for sample_type, _, _ in self.cells})
        return {
            "decides": decides,
            "models": dict(sorted(self.models.items())),
            "asked": self.asked,
            "with_verdict": self.with_verdict,
            "agreeing": self.agreeing,
            "rules_and_judge": self._matrix(None),
            "by_type": {name: self._matrix(name) for name in types},
            "codes": {code: dict(sorted(n.items())) for code, n in sorted(self.by_code.items())},
            "tokens": {"in": self.tokens["in"], "out": self.tokens["out"]},
            "usd": round(self.usd, 6),
            "examples": dict(sorted(self.examples.items())),
        }

    def _matrix(self, sample_type: SampleType | None) -> dict[str, dict[str, int]]:
        columns = (*WITH_VERDICT, *WITHOUT_VERDICT)
        return {
            rules: {judge: self.count(rules, judge, sample_type) for judge in columns}
            for rules in RULES
        }

    def summary_line(self) -> str:
        """Return the number of verdicts and the share of them that agree with the rules."""
        models = ", ".join(sorted(filter(None, self.models))) or "(no answer)"
        share = f" ({self.agreeing / self.with_verdict:.1%})" if self.with_verdict else ""
        return (
            f"judge {models}: {self.with_verdict:,} verdicts on {self.asked:,} samples, "
            f"{self.agreeing:,} of them agree with the rules{share}"
        )

    def lines(self) -> Iterator[str | Table]:
        """Yield what `verify` prints at its end."""
        table = Table("judge \\ rules", box=None)
        for rules in RULES:
            table.add_column(rules, justify="right")
        for judge in (*WITH_VERDICT, *WITHOUT_VERDICT):
            table.add_row(judge, *(f"{self.count(rules, judge):,}" for rules in RULES))
        yield table
        yield self.summary_line()
        if unanswered := sum(self.count(rules, "unanswered") for rules in RULES):
            yield f"warning: {unanswered:,} samples have no answer; repeat the command to ask again"
