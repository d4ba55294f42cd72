"""Build the report's page from the counts of a run: tables, charts and example samples."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from data_tools.coco import AnnotatedImage
from data_tools.instruct.clean import codes as cleaning_codes
from data_tools.instruct.export import LICENSES
from data_tools.instruct.report import outcomes as outcome_table
from data_tools.instruct.report.counts import (
    LONGEST,
    STEPS,
    TYPES,
    RunCounts,
    Usage,
    by_count,
    sum_by_first,
)
from data_tools.instruct.report.draw import SYMBOLS
from data_tools.instruct.report.results import OUTCOMES, Outcome, Result
from data_tools.instruct.report.samples import SampleView, view_sample
from data_tools.instruct.schema import Verdict
from data_tools.instruct.verify import codes as verification_codes
from data_tools.instruct.verify.agreement import (
    RULES,
    WITH_VERDICT,
    WITHOUT_VERDICT,
    Agreement,
)
from vlm_sft.utils.html import data_uri, render_page

Row = Mapping[str, str | int]
"""A row of a table: whole numbers get separators, and stand to the right as all numbers do."""

DETAILED_REASONS: Final = 10
"""Reasons with all their examples; rarer ones have `FEW_EXAMPLES`, so that the page stays small."""
FEW_EXAMPLES: Final = 2
OPEN_REASONS: Final = 3
"""Reasons whose examples are visible at first."""
MAX_ROWS: Final = 30
"""Rows of a table that can be long; the rest is counted."""

UNFINISHED: Final[tuple[Outcome, ...]] = ("unanswered", "unverified", "accepted")
"""Outcomes that a later stage continues with."""

MEANINGS: Final = {
    **{code.name: code.meaning for code in verification_codes.ALL},
    **cleaning_codes.MEANINGS,
    "nothing_to_say": "The annotations in the prompt leave the rules nothing certain to say.",
}
"""Meaning of every code of `verify` and `clean`."""


@dataclass(frozen=True)
class Report:
    """Contents of a report.

    Attributes:
        images: The index.
        image_dir: Directory of the images.
        index, plan, cleaning, export: Contents of `index.json`, `plan.json`, `cleaning.json` and
            `export.json`; empty if the file does not exist.
    """

    counts: RunCounts
    images: Mapping[int, AnnotatedImage]
    image_dir: Path
    index: Mapping[str, Any]
    plan: Mapping[str, Any]
    cleaning: Mapping[str, Any]
    export: Mapping[str, Any]


def render_report(report: Report, charts: Mapping[str, bytes]) -> str:
    """Return the page; the same run gives the same bytes.

    Args:
        report: The contents.
        charts: PNG images by name.
    """
    counts = report.counts
    good = counts.good
    return render_page(
        __package__,
        "report.html",
        title="Instruction data: report",
        lead=f"{counts.step('planned'):,} requests about {counts.asked:,} of {counts.images:,} "
        "images; claims were checked against the annotations.",
        command="report",
        styles=["sample.css", "report.css"],
        script="sample.js",
        headline=headline(counts),
        notices=list(_notices(counts)),
        charts={name: data_uri(data, "png") for name, data in charts.items()},
        funnel=list(_funnel(report)),
        outcomes=[
            {
                "": row.outcome,
                "images": row.images,
                "requests": row.requests or "–",
                "why": row.details,
            }
            for row in outcomes(report)
        ],
        reasons=list(_reasons(report)),
        dropped_turns=_summed(counts.dropped_turns),
        claims=_verdicts(counts.claims),
        claims_by_type=_verdicts(counts.claims_by_type),
        other_checks=_verdicts(counts.other_checks),
        judge=_judge(counts.agreement),
        categories=_categories(counts),
        missing_categories=[
            name for name, _ in by_count(counts.annotated) if not good.covered[name]
        ],
        openings=list(_openings(report)),
        kinds=_shares(good.kinds, "kind of question", "turns"),
        choices=list(_choices(report)),
        yes_no=_yes_no(counts)[:MAX_ROWS],
        num_yes_no=len(_yes_no(counts)),
        lengths=list(_lengths(counts)),
        cost=list(_cost(counts)),
        total_usage=counts.total_usage,
        makers=_makers(counts)[:MAX_ROWS],
        num_makers=len(counts.makers),
        overlap=_overlap(report),
        licenses=_licenses(report),
        gallery=[
            (outcome, counts.outcomes[outcome], [_view(report, r) for r in found.items()])
            for outcome in (counts.good_outcome, "rejected")
            if (found := counts.gallery.get(outcome))
        ],
    )


def headline(counts: RunCounts) -> list[tuple[str, str]]:
    """Return the five most important figures with their captions."""
    good, planned, read = counts.good, counts.step("planned"), counts.step("read")
    claims = counts.claims.total()
    contradicted = sum(n for (_, verdict), n in counts.claims.items() if verdict == "contradicted")
    categories = f"{len(good.covered):,} of {len(counts.annotated):,} categories"
    return [
        (f"{good.samples:,} of {planned:,}", f"requests became {counts.good_outcome} samples"),
        (percent(counts.step("accepted"), read), f"of {read:,} parsed answers passed all checks"),
        (percent(contradicted, claims), f"of {claims:,} checked claims are contradicted"),
        _price(counts),
        (
            f"{len(good.seen):,} of {counts.images:,}",
            f"images have a sample; {categories} occur in them",
        ),
    ]


def _price(counts: RunCounts) -> tuple[str, str]:
    total, good = counts.total_usage, counts.good.samples
    if set(counts.good.origins) == {"rules"} and not total.usd:
        return "no cost", "made by rules on this machine"
    if total.is_priced:
        words = f"per {counts.good_outcome} sample; {money(total.usd)} in total"
        if total.unpriced:
            words += f", without {total.unpriced:,} of {total.answers:,} answers of unknown price"
        return money(total.usd / good) if good else "–", words
    tokens = total.tokens_in + total.tokens_out
    each = f"{tokens / good:,.0f} tokens" if good else "–"
    return each, f"per {counts.good_outcome} sample; {tokens:,} in total, no prices configured"


def percent(part: float, whole: float) -> str:
    """Return a share such as `12.3 %`; a dash if the whole is 0."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def money(usd: float) -> str:
    """Return US dollars with as many digits as matter."""
    if usd == 0 or usd >= 1:
        return f"${usd:,.2f}"
    return f"${usd:.4f}" if usd >= 0.001 else f"${usd:.2g}"


def _notices(counts: RunCounts) -> Iterator[tuple[str, str]]:
    """Yield what no reader may miss: unfinished stages, and samples made by rules."""
    planned = counts.step("planned")
    if not planned:
        yield "warn", "Nothing is planned yet."
    unfinished = Counter({outcome: counts.outcomes[outcome] for outcome in UNFINISHED})
    unfinished["unanswered"] -= counts.lost["answered", "nothing_to_say"]
    parts = [f"{n:,} are {OUTCOMES[outcome]}" for outcome, n in unfinished.items() if n]
    if parts:
        yield "warn", f"Not finished. Of {planned:,} requests {', '.join(parts)}."
    rules, samples = counts.good.origins["rules"], counts.good.samples
    if rules:
        share = "All" if rules == samples else f"{percent(rules, samples)} ({rules:,})"
        yield (
            "",
            f"{share} of the {samples:,} samples were made by rules, a program that puts "
            "annotations into sentences, not by a language model.",
        )


def _funnel(report: Report) -> Iterator[Row]:
    """Yield what is left at each step and what was lost on the way to it."""
    counts = report.counts
    planned = counts.step("planned")
    left_out = {reason: n for reason, n in report.plan.get("left_out", {}).items() if n}
    types: dict[str, str | int] = dict.fromkeys(TYPES, "")
    yield {"": "images indexed", "number": counts.images, "share": "", **types, "lost before": ""}
    yield {
        "": "images with a request",
        "number": counts.asked,
        "share": percent(counts.asked, counts.images),
        **types,
        "lost before": _summed(left_out),
    }
    if not planned:
        return
    for step, words in STEPS.items():
        yield {
            "": words,
            "number": counts.step(step),
            "share": percent(counts.step(step), planned),
            **{str(name): counts.steps[name, step] for name in TYPES},
            "lost before": _summed(
                {reason: n for (lost, reason), n in counts.lost.items() if lost == step}
            ),
        }
    if (exported := report.export.get("samples")) is not None:
        share = percent(exported, planned)
        yield {"": "exported", "number": exported, "share": share, **types, "lost before": ""}


def outcomes(report: Report) -> list[outcome_table.Row]:
    """Return the outcomes of the images and requests."""
    return report.counts.ends.rows(report.index, report.plan)


def _summed(lost: Mapping[str, int], most: int = 6) -> str:
    """Return counts in words, such as `REFUSAL 4, NOT_JSON 2`; "" if there are none."""
    ordered = by_count(lost)
    named = [f"{_plain(reason)} {n:,}" for reason, n in ordered[:most]]
    if rest := sum(n for _, n in ordered[most:]):
        named.append(f"others {rest:,}")
    return ", ".join(named)


def _plain(reason: str) -> str:
    return reason.replace("_", " ") if reason.islower() else reason


def _reasons(report: Report) -> Iterator[Mapping[str, Any]]:
    """Yield the codes of verification and of cleaning, with examples."""
    counts = report.counts
    for title, found, whole in (
        ("rejected", counts.rejected, counts.outcomes["rejected"]),
        ("dropped by cleaning", counts.dropped, counts.outcomes["dropped"]),
    ):
        codes = by_count(sum_by_first(found))
        # Examples of unreadable answers have no claims to look at, so they stay closed.
        readable = [
            code
            for code, _ in codes
            if any(r.sample and r.sample.turns for r in counts.examples[code].items())
        ]
        groups = []
        for rank, (code, n) in enumerate(codes):
            examples = counts.examples[code].items()
            chosen = examples if rank < DETAILED_REASONS else examples[:FEW_EXAMPLES]
            groups.append(
                {
                    "code": code,
                    "count": n,
                    "share": percent(n, whole),
                    "meaning": MEANINGS.get(code, ""),
                    "is_open": code in readable[:OPEN_REASONS],
                    "samples": [_view(report, example) for example in chosen],
                }
            )
        if groups:
            yield {"title": title, "whole": whole, "codes": groups}


def _view(report: Report, result: Result) -> SampleView:
    sample = result.dropped[0] if result.outcome == "dropped" else result.sample
    assert sample is not None
    verdict: Verdict = "contradicted" if result.outcome in ("rejected", "dropped") else "supported"
    badges = [(sample.type, ""), (f"{SYMBOLS[verdict]} {result.outcome}", verdict)]
    if sample.origin == "rules":
        badges.append(("rules", ""))
    image = report.images.get(sample.image.id)
    return view_sample(sample, image, report.image_dir, badges=badges, brief=True)


def _judge(agreement: Agreement) -> Mapping[str, Any] | None:
    """Return how the verdicts of judge and rules compare; None if nothing was judged."""
    if not agreement.asked:
        return None
    money_spent = f", {money(agreement.usd)}" if agreement.usd else ""
    return {
        "summary": agreement.summary_line(),
        "usage": f"{sum(agreement.tokens.values()):,} tokens{money_spent}",
        "rows": [
            {
                "judge": judge,
                **{f"{rules} by the rules": agreement.count(rules, judge) for rules in RULES},
            }
            for judge in (*WITH_VERDICT, *WITHOUT_VERDICT)
        ],
        "codes": [
            {"code": code, **{judge: n[judge] for judge in (*WITH_VERDICT, *WITHOUT_VERDICT)}}
            for code, n in sorted(agreement.by_code.items())
        ][:MAX_ROWS],
        "examples": [
            {"": kind, **example}
            for kind, examples in sorted(agreement.examples.items())
            for example in examples
        ],
    }


def _verdicts(found: Mapping[tuple[str, Verdict], int]) -> list[Row]:
    """Return the verdicts by rule or type, the most frequent first."""
    return [
        {
            "": name,
            "checks": total,
            **{f"{SYMBOLS[v]} {v}": found.get((name, v), 0) for v in get_args(Verdict)},
            "contradicted": percent(found.get((name, "contradicted"), 0), total),
        }
        for name, total in by_count(sum_by_first(found))
    ]


def _categories(counts: RunCounts) -> list[Row]:
    if not counts.good.samples:
        return []
    return [
        {
            "category": name,
            "images": n,
            "with a sample": counts.good.covered[name],
            "share": percent(counts.good.covered[name], n),
            "samples that cite a box": counts.good.cited[name],
        }
        for name, n in by_count(counts.annotated)
    ]


def _shares(found: Mapping[str, int], name: str, unit: str) -> list[Row]:
    total = sum(found.values())
    return [{name: key, unit: n, "share": percent(n, total)} for key, n in by_count(found)]


def _openings(report: Report) -> Iterator[tuple[str, list[Row]]]:
    """Yield how the longer answers of each type begin, as `clean` counted them."""
    for name, found in report.cleaning.get("openings", {}).items():
        rows: list[Row] = [
            {
                "begin with": f"{opening['opening']} …",
                "answers": opening["kept"],
                "share": percent(opening["kept"], found["answers"]["kept"]),
                "before cleaning": opening["before"],
            }
            for opening in found["most_frequent"][:12]
        ]
        if rows:
            yield name, rows


def _choices(report: Report) -> Iterator[tuple[str, list[Row]]]:
    """Yield the answers to multiple-choice questions by family, as `clean` counted them."""
    for family, found in report.cleaning.get("answers", {}).items():
        counts = {name: n for name, n in found["kept"].items() if isinstance(n, int)}
        if sum(counts.values()):
            yield family.replace("_", " / "), _shares(counts, "answer", "turns")


def _yes_no(counts: RunCounts) -> list[Row]:
    found = counts.good.yes_no
    return [
        {
            "category": name,
            "yes": found[name, "yes"],
            "no": found[name, "no"],
            "share of yes": percent(found[name, "yes"], n),
        }
        for name, n in by_count(sum_by_first(found))
    ]


def _lengths(counts: RunCounts) -> Iterator[Row]:
    """Yield median, 95th percentile and maximum of the words per text."""
    words = counts.good.words
    for name, part in dict.fromkeys((name, part) for name, part, _ in sorted(words)):
        if (name, part) == ("detail", "question"):
            continue  # a few fixed questions
        lengths = sorted((n, count) for (t, p, n), count in words.items() if (t, p) == (name, part))
        total, seen = sum(count for _, count in lengths), 0
        quantiles: dict[float, int] = {}
        for length, count in lengths:
            seen += count
            for share in (0.5, 0.95, 1.0):
                if seen >= share * total:
                    quantiles.setdefault(share, length)
        longest = quantiles[1.0]
        yield {
            "type": name,
            "text": f"{part}s",
            "number": total,
            "median words": quantiles[0.5],
            "95 % up to": quantiles[0.95],
            "longest": f"{LONGEST} or more" if longest == LONGEST else longest,
        }


def _cost(counts: RunCounts) -> Iterator[Row]:
    rows = [(name, counts.usage[name]) for name in TYPES if name in counts.usage]
    for name, usage in [*rows, ("all", counts.total_usage)] if rows else []:
        good = sum(counts.steps[t, counts.good_outcome] for t in TYPES if name in (t, "all"))
        yield _cost_row(name, usage, good)


def _cost_row(name: str, usage: Usage, good: int) -> Row:
    tokens = usage.tokens_in + usage.tokens_out
    return {
        "type": name,
        "answers": usage.answers,
        "samples": good,
        "tokens in": usage.tokens_in,
        "of these cached": usage.tokens_cached,
        "tokens out": usage.tokens_out,
        "tokens / sample": f"{tokens / good:,.0f}" if good else "–",
        "cost": money(usage.usd) if usage.is_priced else "–",
        "cost / sample": money(usage.usd / good) if usage.is_priced and good else "–",
    }


def _makers(counts: RunCounts) -> list[Row]:
    return [
        {
            "origin": maker.origin,
            "model": maker.model or "–",
            "type": maker.type,
            "template": f"{maker.template} {maker.template_sha256[:12]}",
            "parameters": maker.parameters,
            "verified samples": n,
        }
        for maker, n in by_count(counts.makers)
    ]


def _overlap(report: Report) -> Mapping[str, Any] | None:
    """Return what the check against evaluation sets found when the requests were planned."""
    guard = report.plan.get("guard")
    if not guard:
        return None
    return {
        "images": guard["evaluation_images"],
        "indexed": report.counts.images,
        "allowed": bool(guard["allow_evaluation_images"]),
        "rows": [
            {
                "evaluation": name,
                "looked at": found["status"],
                "ids in its files": found["listed"] or "–",
                "images here": "?" if found["status"] == "not checked" else found["overlap"],
            }
            for name, found in guard["lists"].items()
        ],
        "unchecked": [name for name, found in guard["lists"].items() if "not" in found["status"]],
    }


def _licenses(report: Report) -> list[Row]:
    known = report.index.get("licenses", {})
    return [
        {
            "license": "unknown" if number is None else str(number),
            "name": str(known.get(str(number), {}).get("name") or LICENSES.get(number or 0, "")),
            "images with a sample": n,
        }
        for number, n in by_count(report.counts.good.images)
    ]
