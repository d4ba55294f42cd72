"""Write chat templates in Jinja, for tokenizers and processors of exported models."""

import re
from collections.abc import Mapping
from typing import Final

_CONTENTS: Final = (
    "{%- set ns = namespace(messages=[]) -%}"
    "{%- for m in messages -%}"
    "{%- if m['tool_calls'] -%}{{- raise_exception('tool_calls: this model was trained without "
    "tools; write the call into the content') -}}{%- endif -%}"
    "{%- set p = namespace(text='', run='', last='') -%}"
    "{%- if m['content'] is string -%}{%- set p.text = m['content'] -%}"
    "{%- elif m['content'] -%}{%- for part in m['content'] -%}"
    "{%- set kind = 'text' if part is string else part['type'] -%}"
    "{%- if kind == 'image' or kind == 'image_url' -%}"
    "{%- if p.last == 'image' or (p.last == 'text' and not p.run.endswith(SEPARATOR)) -%}"
    "{%- set p.text = p.text + SEPARATOR -%}{%- endif -%}"
    "{%- set p.text = p.text + '<image>' -%}{%- set p.run = '' -%}{%- set p.last = 'image' -%}"
    "{%- elif kind == 'text' -%}"
    "{%- set t = part if part is string else part['text'] -%}"
    "{%- if t -%}"
    "{%- if p.last == 'image' and not t.startswith(BEFORE_TEXT) -%}"
    "{%- set p.text = p.text + BEFORE_TEXT -%}{%- endif -%}"
    "{%- set p.text = p.text + t -%}{%- set p.run = p.run + t -%}{%- set p.last = 'text' -%}"
    "{%- endif -%}"
    "{%- else -%}{{- raise_exception('content part of type ' ~ kind ~ ': expected text or image')"
    " -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set c = p.text -%}"
)
"""Makes contents text; lists of parts by the rule of `image_separator.separated_parts`."""

_IMAGE_FIRST: Final = (
    "{%- if m['role'] == 'user' and '<image>' in c -%}"
    "{%- if c.split('<image>') | length > 2 -%}{{- raise_exception('several images in one turn: "
    "this model was trained with one') -}}{%- endif -%}"
    "{%- set c = ('<image>\\n' + (c | replace('<image>', '') | trim)) | trim -%}{%- endif -%}"
)
_TEXT_START: Final = (
    "{%- if m['role'] != 'assistant' and c and not c.startswith('<image>') -%}"
    "{%- set c = START + c -%}{%- endif -%}"
)
_MESSAGES_DONE: Final = (
    "{%- set ns.messages = ns.messages + [{'role': m['role'], 'content': c}] -%}"
    "{%- endfor -%}{%- set messages = ns.messages -%}"
)


def jinja_prelude(
    system: str | None, *, image_separator: str, image_first: bool, text_start: str = ""
) -> str:
    """Return the Jinja before a body, which converts contents to text with `<image>`.

    Args:
        system: System text for conversations without one.
        image_separator: Text between an image part and its neighbors.
        image_first: Put a user turn's image on a line of its own before its text.
        text_start: Text before the text of turns that are no answers.
    """
    before_text = image_separator
    if not image_separator.endswith(text_start):
        before_text += text_start
    contents = _CONTENTS.replace("SEPARATOR", _quote(image_separator))
    contents = contents.replace("BEFORE_TEXT", _quote(before_text))
    prelude = contents + (_IMAGE_FIRST if image_first else "")
    prelude += _TEXT_START.replace("START", _quote(text_start)) if text_start else ""
    prelude += _MESSAGES_DONE
    if system:
        system = text_start + system
        prelude += (
            "{%- if not messages or messages[0]['role'] != 'system' -%}{%- set messages = "
            f"[{{'role': 'system', 'content': {_quote(system)}}}] + messages -%}}{{%- endif -%}}"
        )
    return prelude


def hide_contents_from(body: str, *, as_parts: bool = False) -> str:
    """Return a body that sees a marker in place of each message's content, as in training.

    Otherwise a model's own template would change contents (trimming, conditions on their text) in
    the export and not in training. `{% generation %}` blocks, whose offsets would be wrong, are
    replaced by blocks without effect.

    Args:
        body: The model's own template.
        as_parts: Whether it expects contents as lists of parts.
    """
    body = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", body)
    body = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", body)
    marker = "'vlmsftTurn' ~ loop.index0 ~ 'Content'"
    content = f"[{{'type': 'text', 'text': {marker}}}]" if as_parts else marker
    # The empty expressions keep the tags around the body from trimming its white space.
    return (
        "{%- set hidden = namespace(messages=[]) -%}{%- for m in messages -%}"
        "{%- set hidden.messages = hidden.messages + "
        f"[{{'role': m['role'], 'content': {content}}}] -%}}{{%- endfor -%}}"
        "{%- set contents = messages -%}{%- set messages = hidden.messages -%}"
        f"{{%- set written %}}{{{{ '' }}}}{_without_last_newline(body)}{{{{ '' }}}}{{% endset -%}}"
        "{%- set filled = namespace(text='', rest=written) -%}{%- for m in contents -%}"
        f"{{%- set cut = filled.rest.split({marker}) -%}}"
        "{%- if cut | length != 2 -%}{{- raise_exception('the chat template does not write the ' "
        "~ m['role'] ~ ' message exactly once') -}}{%- endif -%}"
        "{%- set filled.text = filled.text + cut[0] + m['content'] -%}"
        "{%- set filled.rest = cut[1] -%}{%- endfor -%}{{- filled.text + filled.rest -}}"
    )


def _without_last_newline(text: str) -> str:
    """Return a Jinja source without one line end at its end, which Jinja ignores."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def jinja_with_first_space(body: str, bos: str) -> str:
    """Return a body whose text begins with a space after `bos`.

    Some tokenizers put a dummy space before the sequence, but not after a special token. A chat
    template writes BOS itself, so that it must write the space too.
    """
    start = len(bos)
    return (
        f"{{%- set text -%}}{body}{{%- endset -%}}"
        f"{{%- if text[:{start}] == {_quote(bos)} and text[{start}:] and text[{start}] != ' ' "
        f"and text[{start}:{start + 7}] != '<image>' -%}}"
        f"{{{{- text[:{start}] + ' ' + text[{start}:] -}}}}"
        "{%- else -%}{{- text -}}{%- endif -%}"
    )


def jinja_with_image_tokens(body: str, start: str, end: str) -> str:
    """Return a body that writes a token before and one after each `<image>`."""
    image = _quote(f"{start}<image>{end}")
    return (
        f"{{%- set text_with_images -%}}{body}{{%- endset -%}}"
        f"{{{{- text_with_images | replace('<image>', {image}) -}}}}"
    )


def affixes_to_jinja(
    texts: Mapping[str, str],
    *,
    has_system: bool,
    system_inside_user: bool,
    images_only_users: bool,
) -> str:
    """Return the body of a template that puts fixed text around each role's turns.

    Args:
        texts: The fixed texts by `begin` and role and key of a template file, as `user_prefix`.
        has_system: Whether system messages are accepted.
        system_inside_user: The system text is in the first user turn, after its prefix.
        images_only_users: Of user messages only the images are written.
    """
    quoted = {key: _quote(value) for key, value in texts.items()}
    user = "m['content']"
    if images_only_users:
        user = "'<image>' * (m['content'].split('<image>') | length - 1)"
    opening, system = f"{{{{- {quoted['user_prefix']} -}}}}", ""
    no_system = "" if has_system else " or true"
    if has_system:
        before = f"{quoted['user_prefix']} + " if system_inside_user else ""
        system = (
            "{%- if m['role'] == 'system' -%}"
            f"{{{{- {before}{quoted['system_prefix']} + m['content'] + "
            f"{quoted['system_suffix']} -}}}}{{%- endif -%}}"
        )
        if system_inside_user:
            first = "loop.index0 == 1 and messages[0]['role'] == 'system'"
            opening = f"{{%- if not ({first}) -%}}{opening}{{%- endif -%}}"
    answer = " + ".join(
        (
            quoted["assistant_prefix"],
            quoted["assistant_answer_prefix"],
            "m['content']",
            quoted["assistant_answer_suffix"],
            quoted["assistant_stop"],
            quoted["assistant_suffix"],
        )
    )
    return (
        f"{{{{- {quoted['begin']} -}}}}{{%- for m in messages -%}}{system}"
        f"{{%- if m['role'] == 'user' -%}}{opening}{{{{- {user} + {quoted['user_suffix']} -}}}}"
        f"{{%- elif m['role'] == 'assistant' -%}}{{{{- {answer} -}}}}"
        f"{{%- elif m['role'] != 'system'{no_system} -%}}{{{{- raise_exception('no place for a "
        "message of role ' ~ m['role'] ~ ' in this chat template') -}}{%- endif -%}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {quoted['assistant_prefix']} -}}}}{{%- endif -%}}"
    )


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
