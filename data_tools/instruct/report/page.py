"""The report's page: headline figures, the funnel, reasons with images, and all the balances."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from data_tools.coco import AnnotatedImage
from data_tools.instruct.export import LICENSES
from data_tools.instruct.report import charts, markup
from data_tools.instruct.report.charts import Bar
from data_tools.instruct.report.evidence import SYMBOLS, VERDICTS
from data_tools.instruct.report.figures import (
    LONGEST,
    STEPS,
    TYPES,
    Figures,
    Spending,
    Step,
    by_code,
)
from data_tools.instruct.report.journeys import OUTCOMES, Journey, Outcome
from data_tools.instruct.report.markup import escaped
from data_tools.instruct.schema import Verdict
from vlm_sft.utils.html import page, section

IMAGED: Final = 10
"""Reasons with all their examples; rarer ones have `FEW` each, so that the page stays small."""
FEW: Final = 2
OPENED: Final = 3
"""Reasons whose examples are open at first."""
MOST_ROWS: Final = 30
"""Rows of a table; what is left out is counted."""

WAITING: Final[tuple[Outcome, ...]] = ("unanswered", "unverified", "accepted")
"""Outcomes that a further stage goes on with."""

STYLE: Final = (
    markup.STYLE
    + charts.STYLE
    + """
main{max-width:80rem}
.headline{grid-template-columns:repeat(auto-fit,minmax(12.5rem,1fr))}
.headline .big{font-size:1.75rem}
.banner{border-left:4px solid var(--accent);background:var(--card);border-radius:0 8px 8px 0;
padding:.5rem .9rem;margin:.6rem 0}
.banner.warn{border-color:var(--contradicted)}
.samples{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr));
align-items:start}
.samples .sample{padding:.7rem;display:flex;flex-direction:column;gap:.5rem}
.samples .turn,.samples h4{margin:0}
h3{font-size:1.02rem;margin:1.4rem 0 .3rem}h3 code{font-size:1rem}
.bars+details{margin-top:.9rem}details>summary{padding:.2rem 0}
.meaning{color:var(--soft);margin:0 0 .7rem}
.two{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr))}
.two>*,.samples>*{min-width:0}
td.n,th.n{text-align:right;white-space:nowrap}
.card table{min-width:28rem}.wide{overflow-x:auto}
.sub{color:var(--soft);font-size:.9rem;margin:.1rem 0 .8rem}
nav{font-size:.9rem;margin:.4rem 0 1rem;display:flex;flex-wrap:wrap;gap:.2rem .9rem}
nav a{color:var(--accent)}section,h2{scroll-margin-top:.5rem}
@media print{.samples article,section{break-inside:avoid}}
"""
)


@dataclass(frozen=True)
class Report:
    """What a page is made of.

    Attributes:
        figures: Counted.
        images: The index.
        image_dir: The folder of the images.
        index: The content of `index.json`; empty where there is none.
        plan, export: The content of the plan's and of the exports' own counts; empty likewise.
        meanings: What reason codes mean.
    """

    figures: Figures
    images: Mapping[int, AnnotatedImage]
    image_dir: Path
    index: Mapping[str, Any]
    plan: Mapping[str, Any]
    export: Mapping[str, Any]
    meanings: Mapping[str, str]

    @property
    def left_out(self) -> str:
        """Images without a request, by the plan's own words."""
        found = {why: n for why, n in self.plan.get("left_out", {}).items() if n}
        return lost_words(found)


def build(report: Report) -> str:
    """The page; the same run gives the same bytes."""
    figures = report.figures
    parts = [
        ("Funnel", _funnel(report)),
        ("Reasons", _reasons(report)),
        ("Claims", _claims(figures)),
        ("Categories", _categories(figures)),
        ("Questions and answers", _openings(figures) + _kinds(figures)),
        ("Balance", _balance(figures)),
        ("Lengths", _lengths(figures)),
        ("Cost", _cost(figures)),
        ("Made by", _makers(figures)),
        ("Evaluation overlap", _overlap(report)),
        ("Licences", _licences(report)),
        ("Gallery", _gallery(report)),
    ]
    shown = [(title, content) for title, content in parts if content]
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title, _ in shown)
    body = [
        _headline(figures),
        *_banners(figures),
        f"<nav>{links}</nav>",
        *(_section(title, content) for title, content in shown),
    ]
    lead = (
        f"{figures.step('planned'):,} requests about {len(figures.asked):,} of "
        f"{figures.images:,} images; every claim held against the annotations."
    )
    return page("Instruction data: report", lead, body, style=STYLE, script=markup.SCRIPT)


def headline(figures: Figures) -> list[tuple[str, str]]:
    """The five figures that matter most, each with its words."""
    good, planned = figures.good.samples, figures.step("planned")
    read, accepted = figures.step("read"), figures.step("accepted")
    claims = figures.claims.total()
    contradicted = sum(n for (_, verdict), n in figures.claims.items() if verdict == "contradicted")
    images = figures.good.images.total()
    categories = f"{len(figures.good.covered):,} of {len(figures.annotated):,} categories"
    return [
        (f"{good:,} of {planned:,}", f"requests became samples that are {figures.good_outcome}"),
        (percent(accepted, read), f"of {read:,} answers that could be read passed every check"),
        (percent(contradicted, claims), f"of {claims:,} checked claims are contradicted"),
        _price(figures),
        (
            f"{images:,} of {figures.images:,}",
            f"images have a sample; {categories} occur in them",
        ),
    ]


def _price(figures: Figures) -> tuple[str, str]:
    total, good = figures.total_spending(), figures.good.samples
    if set(figures.good.origins) == {"rules"} and not total.usd:
        return "no cost", "made by rules on this machine"
    if total.is_priced:
        each = money(total.usd / good) if good else "–"
        words = f"a sample that is {figures.good_outcome}; {money(total.usd)} in all"
        if total.unpriced:
            words += f", without {total.unpriced:,} of {total.answers:,} answers of unknown price"
        return each, words
    tokens = total.tokens_in + total.tokens_out
    each = f"{tokens / good:,.0f} tokens" if good else "–"
    return each, f"a sample that is {figures.good_outcome}; {tokens:,} in all, no prices given"


def percent(part: float, whole: float) -> str:
    """`12.3 %`; a dash where there is nothing to be a part of."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def money(usd: float) -> str:
    """US dollars with as many digits as say something."""
    if usd == 0 or usd >= 1:
        return f"${usd:,.2f}"
    return f"${usd:.4f}" if usd >= 0.001 else f"${usd:.2g}"


def _headline(figures: Figures) -> str:
    inner = "".join(
        f'<div class="card"><div class="big">{escaped(figure)}</div>{escaped(words)}</div>'
        for figure, words in headline(figures)
    )
    return f'<div class="grid headline">{inner}</div>'


def _banners(figures: Figures) -> Iterator[str]:
    """What no reader may miss: who made it, and what has not been done yet."""
    rules, samples = figures.good.origins["rules"], figures.good.samples
    if rules:
        share = "All" if rules == samples else f"{percent(rules, samples)} ({rules:,})"
        yield (
            f'<p class="banner">{share} of the {samples:,} samples were made by rules, a program '
            "that puts annotations into sentences, not by a language model.</p>"
        )
    open_ = Counter({outcome: figures.outcomes[outcome] for outcome in WAITING})
    open_["unanswered"] -= figures.lost["answered", "nothing_to_say"]
    waiting = [f"{count:,} are {OUTCOMES[outcome]}" for outcome, count in open_.items() if count]
    if waiting:
        yield (
            f'<p class="banner warn"><strong>Not finished.</strong> Of '
            f"{figures.step('planned'):,} requests {', '.join(waiting)}.</p>"
        )
    if not figures.step("planned"):
        yield '<p class="banner warn"><strong>Nothing is planned yet.</strong></p>'


def _section(title: str, content: str) -> str:
    return f'<div id="{_anchor(title)}">{section(title, content)}</div>'


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _funnel(report: Report) -> str:
    figures = report.figures
    planned = figures.step("planned")
    bars = [
        _share("images indexed", figures.images, figures.images),
        _share("images asked about", len(figures.asked), figures.images, report.left_out),
    ]
    if not planned:
        return charts.bars(bars, 1)
    bars += [
        _share(words, figures.step(step), planned, lost) for step, words, lost in funnel(figures)
    ]
    exported = report.export.get("samples")
    if exported is not None:
        bars.append(_share("exported", exported, planned))
    rows = [
        {"": words, **{name: f"{figures.step(step, name):,}" for name in TYPES}}
        for step, words in STEPS.items()
    ]
    return (
        f"{charts.bars(bars, 1)}<details><summary>By type</summary>"
        f"{_table(('', *TYPES), rows)}</details>"
    )


def _share(label: str, count: int, whole: int, below: str = "") -> Bar:
    return Bar(label, {"accent": count / whole if whole else 0}, _of(count, whole), below)


def funnel(figures: Figures) -> Iterator[tuple[Step, str, str]]:
    """Each step with its name and what was lost on the way to it, in words."""
    for step, words in STEPS.items():
        lost = {why: n for (found, why), n in figures.lost.items() if found == step}
        yield step, words, lost_words(lost)


def lost_words(lost: Mapping[str, int], most: int = 6) -> str:
    """`− 6 lost: REFUSAL 4, NOT_JSON 2`; "" where nothing was."""
    ordered = sorted(lost.items(), key=lambda entry: (-entry[1], entry[0]))
    if not ordered:
        return ""
    named = [
        f"{why.replace('_', ' ') if why.islower() else why} {n:,}" for why, n in ordered[:most]
    ]
    if rest := sum(n for _, n in ordered[most:]):
        named.append(f"others {rest:,}")
    return f"− {sum(lost.values()):,} lost: {', '.join(named)}"


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({percent(part, whole)})"


def _reasons(report: Report) -> str:
    figures = report.figures
    parts = []
    for title, counts, whole in (
        ("rejected", figures.rejections, figures.outcomes["rejected"]),
        ("set aside by cleaning", figures.set_asides, figures.outcomes["set_aside"]),
    ):
        codes = by_code(counts)
        if not codes:
            continue
        note = f"{whole:,} samples are {title}; one may have several reasons."
        parts.append(f'<p class="sub">{note}</p>')
        parts.append(charts.bars([_reason_bar(code, n, whole) for code, n in codes], codes[0][1]))
        opened = [code for code, _ in codes if _speaks(figures, code)][:OPENED]
        parts += [
            _examples(report, code, n, rank, code in opened) for rank, (code, n) in enumerate(codes)
        ]
    if figures.turns_set_aside:
        turns = lost_words(figures.turns_set_aside, most=20).removeprefix("− ")
        parts.append(f'<p class="note">Single turns of samples that are kept: {escaped(turns)}</p>')
    return markup.LEGEND + "".join(parts) if parts else ""


def _reason_bar(code: str, count: int, whole: int) -> Bar:
    return Bar(code, {"accent": count}, _of(count, whole))


def _speaks(figures: Figures, code: str) -> bool:
    """Whether samples with the code could be read, so that there is a claim to look at."""
    return any(j.sample and j.sample.turns for j in figures.examples[code].items())


def _examples(report: Report, code: str, count: int, rank: int, is_open: bool) -> str:
    found = report.figures.examples[code].items()
    chosen = found if rank < IMAGED else found[:FEW]
    cards = "".join(_card(report, journey) for journey in chosen)
    meaning = report.meanings.get(code, "")
    opened = " open" if is_open else ""
    return (
        f"<details{opened}><summary><code>{escaped(code)}</code>: {count:,} "
        f"sample{'' if count == 1 else 's'}, {len(chosen)} shown</summary>"
        f'<p class="meaning">{escaped(meaning)}</p><div class="samples">{cards}</div></details>'
    )


def _card(report: Report, journey: Journey) -> str:
    sample = journey.left_out[0] if journey.outcome == "set_aside" else journey.sample
    assert sample is not None
    verdict: Verdict = (
        "contradicted" if journey.outcome in ("rejected", "set_aside") else "supported"
    )
    word = OUTCOMES[journey.outcome].split(",")[0]
    if journey.outcome == "set_aside":
        word = "set aside"
    badges = [markup.badge(sample.type), markup.badge(f"{SYMBOLS[verdict]} {word}", verdict)]
    if sample.origin == "rules":
        badges.append(markup.badge("rules"))
    image = report.images.get(sample.image.id)
    return markup.card(report.image_dir, image, sample, badges, markup.BRIEF)


def _claims(figures: Figures) -> str:
    if not figures.claims and not figures.other_checks:
        return ""
    about, other = _rule_bars(figures.claims), _rule_bars(figures.other_checks)
    by_type = [
        _verdict_bar(name, {v: figures.claims_by_type[name, v] for v in VERDICTS})
        for name in TYPES
        if any(figures.claims_by_type[name, v] for v in VERDICTS)
    ]
    names = {str(verdict): f"{SYMBOLS[verdict]} {verdict}" for verdict in VERDICTS}
    parts = [charts.key(names)]
    if about:
        whole = charts.bars([_whole(bar) for bar in by_type], 1)
        parts.append(f"<h3>By rule</h3>{charts.bars(about, _longest(about))}")
        parts.append(f"<h3>By type, each as a whole</h3>{whole}")
    if other:
        title = "Checks of form, manner and citations, which are no claims about the image"
        parts.append(f"<h3>{title}</h3>{charts.bars(other, _longest(other))}")
    return "".join(parts)


def _rule_bars(counts: Mapping[tuple[str, Verdict], int]) -> list[Bar]:
    """Return a bar for each rule, the one with most checks first."""
    rules: dict[str, dict[str, int]] = {}
    for (rule, verdict), count in counts.items():
        rules.setdefault(rule, dict.fromkeys(VERDICTS, 0))[verdict] = count
    ordered = sorted(rules.items(), key=lambda entry: (-sum(entry[1].values()), entry[0]))
    return [_verdict_bar(rule, found) for rule, found in ordered]


def _longest(bars: Sequence[Bar]) -> float:
    return max(sum(bar.parts.values()) for bar in bars)


def _verdict_bar(label: str, counts: Mapping[Any, int]) -> Bar:
    numbers = " ".join(f"{SYMBOLS[verdict]} {counts[verdict]:,}" for verdict in VERDICTS)
    return Bar(label, dict(counts), numbers)


def _whole(bar: Bar) -> Bar:
    total = sum(bar.parts.values())
    parts = {css: length / total for css, length in bar.parts.items()} if total else {}
    return Bar(bar.label, parts, bar.number)


def _categories(figures: Figures) -> str:
    if not figures.annotated or not figures.good.samples:
        return ""
    ordered = sorted(figures.annotated.items(), key=lambda entry: (-entry[1], entry[0]))
    rows = [
        {
            "category": name,
            "images": f"{count:,}",
            "with a sample": f"{figures.good.covered[name]:,}",
            "share": percent(figures.good.covered[name], count),
            "samples that cite a box": f"{figures.good.cited[name]:,}",
        }
        for name, count in ordered
    ]
    missing = [name for name, _ in ordered if not figures.good.covered[name]]
    bars = [
        Bar(
            name,
            {"supported": figures.good.covered[name], "rest": count - figures.good.covered[name]},
            f"{figures.good.covered[name]:,} / {count:,}",
        )
        for name, count in ordered[:20]
    ]
    none = f"No sample: {', '.join(missing)}." if missing else "Every category has a sample."
    return (
        '<p class="sub">Images with a sample, of the images in which the category is '
        f"annotated; the {len(bars)} commonest. {escaped(none)}</p>"
        f"{charts.bars(bars, ordered[0][1])}"
        f"<details><summary>All {len(rows)} categories</summary>{_table(tuple(rows[0]), rows)}"
        "</details>"
    )


def _openings(figures: Figures) -> str:
    good = figures.good
    if not good.questions.total:
        return ""
    columns = []
    for title, openings in (("Questions begin", good.questions), ("Answers begin", good.answers)):
        top = openings.most_common(12)
        bars = [Bar(f"{words} …", {"accent": n}, percent(n, openings.total)) for words, n in top]
        at_least = "at least " if openings.least else ""
        note = f"{openings.total:,} texts, {at_least}{openings.different:,} different openings."
        columns.append(
            f'<div><h3>{title}</h3>{charts.bars(bars, top[0][1])}<p class="note">{note}</p></div>'
        )
    return f'<div class="two">{"".join(columns)}</div>'


def _kinds(figures: Figures) -> str:
    kinds = sorted(figures.good.kinds.items(), key=lambda entry: (-entry[1], entry[0]))
    if not kinds:
        return ""
    total = figures.good.kinds.total()
    bars = [Bar(kind, {"accent": count}, _of(count, total)) for kind, count in kinds]
    return f"<h3>What the questions are about</h3>{charts.bars(bars, kinds[0][1])}"


def _balance(figures: Figures) -> str:
    good = figures.good
    families = sorted({family for family, _ in good.choices})
    if not families:
        return ""
    note = (
        '<p class="sub">Questions that are a choice among a few answers: what a guesser who does '
        "not look could profit from.</p>"
    )
    parts = []
    for family in families:
        said = {value: n for (found, value), n in sorted(good.choices.items()) if found == family}
        total = sum(said.values())
        bars = [Bar(value, {"accent": n}, _of(n, total)) for value, n in said.items()]
        parts.append(f"<div><h3>{family.replace('_', ' / ')}</h3>{charts.bars(bars, total)}</div>")
    return f'{note}<div class="two">{"".join(parts)}</div>' + _yes_no(figures)


def _yes_no(figures: Figures) -> str:
    counts = figures.good.yes_no
    names = sorted({name for name, _ in counts})
    if not names:
        return ""
    names.sort(key=lambda name: (-counts[name, "yes"] - counts[name, "no"], name))
    bars = [
        _whole(
            Bar(
                name,
                {"supported": counts[name, "yes"], "unknown": counts[name, "no"]},
                f"yes {counts[name, 'yes']:,} · no {counts[name, 'no']:,}",
            )
        )
        for name in names[:MOST_ROWS]
    ]
    key = charts.key({"supported": "yes", "unknown": "no"})
    left = len(names) - len(bars)
    note = f'<p class="note">{left} rarer categories are left out.</p>' if left else ""
    return (
        f"<details open><summary>Yes and no by the category that the question names</summary>"
        f"{key}{charts.bars(bars, 1)}{note}</details>"
    )


def _lengths(figures: Figures) -> str:
    words = figures.good.words
    parts = []
    for name in TYPES:
        for part in ("question", "answer"):
            counts = {n: c for (t, p, n), c in words.items() if t == name and p == part}
            if counts and not (name == "detail" and part == "question"):
                parts.append(
                    f"<div><h3>{name}: {part}s</h3>"
                    f"{charts.histogram(counts, 'words', f'{part}s')}"
                    f'<p class="note">{_spread(counts)}</p></div>'
                )
    return f'<div class="two">{"".join(parts)}</div>' if parts else ""


def _spread(counts: Mapping[int, int]) -> str:
    """Median, 95th percentile and longest of counted numbers."""
    total, seen = sum(counts.values()), 0
    places: dict[float, int] = {}
    for value in sorted(counts):
        seen += counts[value]
        for share in (0.5, 0.95, 1.0):
            if seen >= share * total:
                places.setdefault(share, value)
    longest = f"{LONGEST} or more" if places[1.0] == LONGEST else str(places[1.0])
    return f"median {places[0.5]}, 95 % up to {places[0.95]}, longest {longest} words"


def _cost(figures: Figures) -> str:
    if not figures.spending:
        return ""
    rows = [
        _cost_row(name, figures.spending[name], figures.step(figures.good_outcome, name))
        for name in TYPES
        if name in figures.spending
    ]
    total = figures.total_spending()
    rows.append(_cost_row("all", total, figures.good.samples))
    note = (
        f"{total.unpriced:,} of {total.answers:,} answers have no price, since the configuration "
        "names none or the server counted no tokens; the sums of money are of the others."
        if total.unpriced
        else "Money by the prices of the configuration; rejected answers are paid for too."
    )
    return f'{_table(tuple(rows[0]), rows)}<p class="note">{note}</p>'


def _cost_row(name: str, spending: Spending, good: int) -> dict[str, str]:
    tokens = spending.tokens_in + spending.tokens_out
    return {
        "type": name,
        "answers": f"{spending.answers:,}",
        "samples": f"{good:,}",
        "tokens in": f"{spending.tokens_in:,}",
        "of them cached": f"{spending.tokens_cached:,}",
        "tokens out": f"{spending.tokens_out:,}",
        "tokens / sample": f"{tokens / good:,.0f}" if good else "–",
        "money": money(spending.usd) if spending.is_priced else "–",
        "money / sample": money(spending.usd / good) if spending.is_priced and good else "–",
    }


def _makers(figures: Figures) -> str:
    ordered = sorted(
        figures.makers.items(), key=lambda entry: (-entry[1], entry[0].type, str(entry[0]))
    )
    rows = [
        {
            "origin": maker.origin,
            "model": maker.model or "–",
            "type": maker.type,
            "template": f"{maker.template} {maker.template_sha256[:12]}",
            "parameters": maker.parameters,
            "verified samples": f"{count:,}",
        }
        for maker, count in ordered[:MOST_ROWS]
    ]
    left = sum(count for _, count in ordered[MOST_ROWS:])
    note = f'<p class="note">{left:,} samples of other makers.</p>' if left else ""
    return _table(tuple(rows[0]), rows) + note if rows else ""


def _overlap(report: Report) -> str:
    """What the split guard found when the requests were planned."""
    guard = report.plan.get("guard")
    if not guard:
        return ""
    verdict = (
        "were let through, for guard.allow_evaluation_images is true"
        if guard["allow_evaluation_images"]
        else "were refused: no request is about them"
    )
    rows = [
        {
            "evaluation": name,
            "looked at": found["status"],
            "ids in its files": f"{found['listed']:,}" if found["listed"] else "–",
            "images here": "?" if found["status"] == "not checked" else f"{found['overlap']:,}",
        }
        for name, found in guard["lists"].items()
    ]
    unchecked = [name for name, found in guard["lists"].items() if "not" in found["status"]]
    note = (
        f'<p class="note">Nobody looked for images of {escaped(", ".join(unchecked))}: no file '
        "with their ids was given (guard.lists).</p>"
        if unchecked
        else ""
    )
    return (
        f"<p>{guard['evaluation_images']:,} of {report.figures.images:,} indexed images are "
        f"used by evaluations; they {verdict}.</p>{_table(tuple(rows[0]), rows)}{note}"
    )


def _licences(report: Report) -> str:
    counts = report.figures.good.images
    if not counts:
        return ""
    known = report.index.get("licenses", {})
    rows = [
        {
            "licence": "unknown" if number is None else str(number),
            "name": str(known.get(str(number), {}).get("name") or LICENSES.get(number or 0, "")),
            "images with a sample": f"{count:,}",
        }
        for number, count in sorted(counts.items(), key=lambda entry: (-entry[1], str(entry[0])))
    ]
    return _table(tuple(rows[0]), rows)


def _gallery(report: Report) -> str:
    figures = report.figures
    parts = []
    for outcome in (figures.good_outcome, "rejected"):
        if outcome not in figures.gallery:
            continue
        found = figures.gallery[outcome].items()
        total = figures.outcomes[outcome]
        cards = "".join(_card(report, journey) for journey in found)
        parts.append(
            f"<h3>{len(found)} of {total:,} {outcome} samples, drawn at random</h3>"
            f'<div class="samples">{cards}</div>'
        )
    return "".join(parts)


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """A table whose columns of numbers stand to the right."""
    numeric = {
        name: all(row[name][:1].isdigit() or row[name][:1] in "$–" for row in rows)
        for name in columns
    }

    def cell(tag: str, name: str, text: str) -> str:
        css = ' class="n"' if numeric[name] else ""
        return f"<{tag}{css}>{escaped(text)}</{tag}>"

    head = "".join(cell("th", name, name) for name in columns)
    lines = ("".join(cell("td", name, row[name]) for name in columns) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'
