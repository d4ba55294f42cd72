"""One sample as a page: the image with its boxes beside the turns, then everything sent."""

from collections.abc import Iterator, Mapping
from typing import Final

from data_tools.instruct.report import markup
from data_tools.instruct.report.explanation import Explanation, cost, model, parameters
from data_tools.instruct.report.markup import escaped
from vlm_sft.utils.escape import escape_control
from vlm_sft.utils.html import page

_STYLE: Final = (
    markup.STYLE
    + """
main{max-width:80rem}
.whole{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:1.2rem}
.whole .raw{max-height:none}.whole .shown{position:sticky;top:1rem;align-self:start}
@media(max-width:52rem){.whole{grid-template-columns:minmax(0,1fr)}.whole .shown{position:static}}
.caps{display:grid;grid-template-columns:max-content 1fr;gap:.15rem .7rem;margin-top:.7rem;
font-size:.93rem}.caps dt,.caps dd{margin:0;border-radius:4px}
.caps .hot{background:var(--unknown-soft);outline:2px solid #e0007a}
.stages{list-style:none;padding:0;margin:0;display:flex;flex-wrap:wrap;gap:.4rem 1.2rem}
.stages li{overflow-wrap:anywhere}
.turn .cites{color:var(--soft);font-size:.84rem}
pre{unicode-bidi:isolate;background:var(--chip);border-radius:8px;padding:.6rem}
h3{margin:1rem 0 .3rem;font-size:1.02rem}.role{font-weight:600;margin:.6rem 0 .2rem}
dl{margin:0}dd{font-weight:500}
"""
)

_SYMBOLS: Final = {True: ("✓", "supported"), False: ("✗", "contradicted"), None: ("·", "")}


def build(found: Explanation) -> str:
    """The page."""
    request = found.request
    name = found.image.file_name if found.image else "not in the index"
    body = [
        f'<div class="card"><ul class="stages">{"".join(_stages(found))}</ul></div>',
        f'{markup.LEGEND}<div class="card whole" data-scope>{_image(found)}'
        f"<div>{_turns(found)}</div></div>",
        *_details(found),
    ]
    lead = f"{request.type}, image {request.image} ({name})"
    title = escape_control(request.sample_id)
    return page(title, escape_control(lead), body, style=_STYLE, script=markup.SCRIPT)


def _stages(found: Explanation) -> Iterator[str]:
    for stage in found.stages:
        symbol, css = _SYMBOLS[stage.done]
        yield (
            f'<li class="{css}"><span class="sy">{symbol} {escaped(stage.name)}</span> '
            f"{escaped(stage.words)}</li>"
        )


def _image(found: Explanation) -> str:
    if found.image is None:
        return f'<p class="gone">image {found.request.image} is not in the index</p>'
    shown, sample = found.request.shown, found.sample
    captions = "".join(
        f'<dt>{label}</dt><dd data-b="{label}">{escaped(text)}</dd>'
        for label, text in found.captions.items()
    )
    told = "; ".join(f"{len(ids)} {name}" for name, ids in shown.summarised.items())
    told = f"<dt>number</dt><dd>{escaped(told)}</dd>" if told else ""
    figure = markup.figure(found.image_dir, found.image, shown, sample, markup.WHOLE)
    return f'<div class="shown">{figure}<dl class="caps">{captions}{told}</dl></div>'


def _turns(found: Explanation) -> str:
    if found.sample is None:
        words = "not answered yet" if found.answer is None else "not verified yet"
        return f'<p class="cut">{words}</p>'
    names = found.names
    turns = markup.turns(found.sample, names, markup.WHOLE)
    return turns + markup.findings(found.sample, names, markup.WHOLE)


def _details(found: Explanation) -> Iterator[str]:
    fixed, own = found.messages[:-1], found.messages[-1]
    before = "".join(map(_message, fixed))
    yield _card(
        "Prompt as sent",
        f"<details><summary>{len(fixed)} messages before it, the same in every "
        f"{escaped(found.request.template)} request</summary>{before}</details>{_message(own)}",
    )
    if found.answer is not None:
        yield _card("Raw answer", f"<pre>{escaped(found.answer.text)}</pre>")
    facts = {
        "model": model(found),
        "parameters": parameters(found.request),
        "cost": cost(found),
        "request": found.request.id,
        "template": f"{found.request.template} {found.request.template_sha256}",
    }
    pairs = "".join(f"<dt>{name}</dt><dd>{escaped(text)}</dd>" for name, text in facts.items())
    yield _card("Receipt", f"<dl>{pairs}</dl>")


def _message(message: Mapping[str, str]) -> str:
    return f'<p class="role">{escaped(message["role"])}</p><pre>{escaped(message["content"])}</pre>'


def _card(title: str, content: str) -> str:
    return f'<h2>{title}</h2><div class="card">{content}</div>'
