"""Make a chat template see llama.cpp's images."""

import json
from typing import Final

_BEFORE: Final = (
    "{%- set media = namespace(marker='', messages=[]) -%}"
    "{%- for m in messages -%}"
    "{%- if m['content'] is string and '<__media' in m['content'] -%}"
    "{%- set pieces = m['content'].split('<__media') -%}"
    "{%- set t = namespace(text=pieces[0], run=pieces[0], images=0) -%}"
    "{%- for piece in pieces[1:] -%}"
    "{%- set name = piece.split('__>')[0] -%}"
    "{%- set media.marker = '<__media' + name + '__>' -%}"
    "{%- set rest = piece[(name | length) + 3:] -%}"
    "{%- if (t.run or t.images) and not (t.run and t.run.endswith(SEPARATOR)) -%}"
    "{%- set t.text = t.text + SEPARATOR -%}{%- endif -%}"
    "{%- set t.text = t.text + '<image>' -%}{%- set t.images = t.images + 1 -%}"
    "{%- if rest and not rest.startswith(SEPARATOR) -%}"
    "{%- set t.text = t.text + SEPARATOR -%}{%- endif -%}"
    "{%- set t.text = t.text + rest -%}{%- set t.run = rest -%}"
    "{%- endfor -%}"
    "{%- set media.messages = media.messages + [{'role': m['role'], 'content': t.text}] -%}"
    "{%- else -%}{%- set media.messages = media.messages + [m] -%}{%- endif -%}"
    "{%- endfor -%}{%- set messages = media.messages -%}"
    "{%- set whole -%}"
)
_AFTER: Final = (
    "{%- endset -%}{{- (whole | replace('<image>', media.marker)) if media.marker else whole -}}"
)


def llama_cpp_template(chat_template: str, separator: str) -> str:
    """Return a chat template that puts the separator of training around images.

    llama.cpp passes each message as one text, with a marker `<__media...__>` for every image and
    nothing between it and its neighbors. The marker becomes `<image>` with the separators of
    `image_separator.separated_parts`, and afterwards the marker again.

    Args:
        chat_template: Jinja text that writes `<image>` for an image.
        separator: Text between an image and its neighbors in training.
    """
    return _BEFORE.replace("SEPARATOR", _quoted(separator)) + chat_template + _AFTER


def _quoted(text: str) -> str:
    return "'" + json.dumps(text)[1:-1].replace("'", "\\'").replace('\\"', '"') + "'"
