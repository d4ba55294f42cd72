"""One sample for a terminal: nothing of a foreign text commands it."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from data_tools.instruct.report.evidence import SYMBOLS, deciding, evidence, pieces, spans_of
from data_tools.instruct.report.explanation import Explanation, cost, model, parameters
from data_tools.instruct.schema import Check, Sample, Verdict
from vlm_sft.utils.escape import escape_control

_STYLES: dict[Verdict, str] = {
    "supported": "blue",
    "contradicted": "bold red",
    "unknown": "yellow",
}
_DONE = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("·", "dim")}


def show(console: Console, found: Explanation, *, whole_prompt: bool) -> None:
    """Print everything about a sample.

    Args:
        console: Where to.
        found: What to.
        whole_prompt: System text and seed examples too; else they are told by their size.
    """
    request = found.request
    console.print(_title(found))
    console.print(_panel("stages", _stages(found)))
    console.print(_panel("shown to the teacher", Group(*_shown(found))))
    console.print(_panel("prompt", Group(*_prompt(found, whole_prompt))))
    if found.answer is not None:
        console.print(_panel("raw answer", Text(escape_control(found.answer.text))))
    if found.sample is not None and found.sample.turns:
        console.print(_panel("turns", Group(*_turns(found.sample))))
    if found.sample is not None and found.sample.checks:
        title = f"what was found in {len(found.sample.checks)} checks"
        console.print(_panel(title, _checks(found.sample, found.names)))
    facts = {
        "model": model(found),
        "parameters": parameters(request),
        "cost": cost(found),
        "request": request.id,
        "template": f"{request.template} {request.template_sha256}",
    }
    console.print(_panel("receipt", _pairs(facts)))


def _title(found: Explanation) -> Text:
    image = found.request.image
    name = found.image.file_name if found.image else "not in the index"
    text = Text(escape_control(found.request.sample_id), style="bold")
    return text.append(f"  image {image}, {escape_control(name)}", style="dim")


def _panel(title: str, content: RenderableType) -> Panel:
    return Panel(content, title=title, title_align="left", border_style="dim")


def _stages(found: Explanation) -> Table:
    grid = Table.grid(padding=(0, 1))
    for stage in found.stages:
        symbol, style = _DONE[stage.done]
        grid.add_row(Text(symbol, style=style), stage.name, Text(escape_control(stage.words)))
    return grid


def _shown(found: Explanation) -> Iterator[RenderableType]:
    for label, caption in found.captions.items():
        yield Text(f"{label}  {escape_control(caption)}")
    boxes = [name for name in found.names.values() if name[:1] == "b"]
    yield Text(escape_control(f"{len(boxes)} boxes: " + ", ".join(boxes)))
    told = {name: len(ids) for name, ids in found.request.shown.summarised.items()}
    if told:
        numbers = ", ".join(f"{count} {name}" for name, count in told.items())
        yield Text(escape_control(f"told as a number: {numbers}"))


def _prompt(found: Explanation, whole: bool) -> Iterator[RenderableType]:
    fixed, own = found.messages[:-1], found.messages[-1]
    if not whole:
        size = sum(len(message["content"]) for message in fixed)
        yield Text(
            f"{len(fixed)} messages before it, the same in every {found.request.template} request: "
            f"{size:,} characters (--prompt shows them)",
            style="dim",
        )
    for message in (*fixed, own) if whole else (own,):
        yield Text(f"{message['role']}:", style="bold")
        yield Text(escape_control(message["content"]))


def _turns(sample: Sample) -> Iterator[RenderableType]:
    for index, turn in enumerate(sample.turns):
        for label, part, text in (("Q", "question", turn.question), ("A", "answer", turn.answer)):
            line = Text(f"{label} ", style="bold")
            yield line.append_text(
                claims(text, sample.checks, spans_of(sample.checks, index, part))
            )
        cited = ", ".join(turn.evidence) or "nothing"
        yield Text(escape_control(f"  {turn.kind}; cites {cited}"), style="dim")


def claims(text: str, checks: Sequence[Check], spans: Mapping[int, tuple[int, int]]) -> Text:
    """The text with its claims in brackets, each with its verdict's symbol and its number."""
    marked = Text()
    for piece in pieces(text, spans):
        marked.append("[" * len(piece.opening), style="dim")
        over = [checks[index].verdict for index in piece.covering]
        worst = next((v for v in ("contradicted", "unknown", "supported") if v in over), None)
        marked.append(escape_control(piece.text), style=_STYLES[worst] if worst else "")
        for index in piece.closing:
            verdict = checks[index].verdict
            marked.append(f"]{SYMBOLS[verdict]}{index + 1}", style=_STYLES[verdict])
    return marked


def _checks(sample: Sample, names: Mapping[int, str]) -> Table:
    table = Table(box=None, padding=(0, 1))
    for name in ("", "verdict", "rule", "claim", "rests on", "code"):
        table.add_column(name, overflow="fold")
    decided = deciding(sample)
    for number, check in enumerate(sample.checks, 1):
        style = _STYLES[check.verdict]
        table.add_row(
            Text(f"{SYMBOLS[check.verdict]}{number}", style=style),
            Text(check.verdict, style=style),
            Text(escape_control(check.rule)),
            Text(escape_control(check.claim)),
            Text(escape_control(evidence(check, names))),
            Text(escape_control(check.code or ""), style="bold" if check in decided else ""),
        )
    return table


def _pairs(facts: Mapping[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, words in facts.items():
        grid.add_row(Text(name, style="dim"), Text(escape_control(words)))
    return grid
