"""A teacher's text as turns: strict JSON first, then JSON in a wrapping, which is noted.

Nothing is repaired: an answer that is not exactly one object of the form asked for is refused
with a code of `verification.codes`.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from data_tools.instruct.schema import (
    Answer,
    Check,
    ConversationForm,
    DetailForm,
    Request,
    Turn,
    answer_form,
)
from data_tools.instruct.verify.manner import is_refusal

FINISHED: Final = frozenset({"stop", "end_turn", "eos", None})
"""Finish reasons of an answer that is whole; None: the teacher gives none."""
ECHO: Final = 80
"""This many characters of the prompt in a row are an echo."""


@dataclass(frozen=True)
class Parsed:
    """What was read; `turns` is empty where one of the `checks` carries a code."""

    turns: tuple[Turn, ...]
    checks: tuple[Check, ...]


def read_turns(request: Request, answer: Answer) -> Parsed:
    """Return the answer's turns, with a note for every deviation from plain JSON."""
    text, thought = after_thinking(answer.text.strip())
    if answer.finish not in FINISHED:
        return _refused("ANSWER_CUT", f"finish: {answer.finish}")
    if not text:
        return _refused("ANSWER_EMPTY", "no text")
    found = read_object(text)
    if isinstance(found, str):
        return _refused(_why(text, request) or found, text[:80])
    content, notes = found
    notes = [*thought, *notes]
    outside = notes and _rest(text)
    if outside and is_refusal(outside):
        return _refused("REFUSAL", outside[:80])
    if _echoes(content, request):
        return _refused("PROMPT_ECHO", text[:80])
    turns = _turns(content, request)
    if isinstance(turns, str):
        return _refused("WRONG_SCHEMA", turns)
    return Parsed(turns, tuple(_note(note) for note in notes))


def after_thinking(text: str) -> tuple[str, list[str]]:
    """Return the text after a model's thinking, and a note if there was any.

    Chat templates that open the thinking themselves leave only its end in the text.
    """
    plain = text.startswith("{") and text.endswith("}") and "</" not in text
    match = None if plain or _parses(text) else _THINKING.match(text)
    if match is None:
        return text, []
    return text[match.end() :].strip(), ["thinking before the answer"]


def read_object(text: str) -> tuple[str, list[str]] | str:
    """Return the text of the one JSON object and what stood around it; or why there is none."""
    if _parses(text):
        return text, []
    objects = _objects(text)
    if not objects:
        return "NOT_JSON"
    if len(objects) > 1:
        return "SEVERAL_OBJECTS"
    begin, end = objects[0]
    outside = (text[:begin] + text[end:]).strip()
    fenced = _FENCE.fullmatch(text)
    notes = ["Markdown fences around the object"] if fenced else []
    if outside and not fenced:
        notes = ["text around the object"]
    content = text[begin:end]
    if _parses(content):
        return content, notes
    without = _TRAILING_COMMA.sub(r"\1", content)
    if _parses(without):
        return without, [*notes, "a comma before a closing bracket"]
    return "NOT_JSON"


def _objects(text: str) -> list[tuple[int, int]]:
    """Return the places of the outermost `{...}`; an unclosed one is not an object."""
    found: list[tuple[int, int]] = []
    begin = text.find("{")
    while begin >= 0:
        end = _end_of_object(text, begin)
        if end is None:
            break
        found.append((begin, end))
        begin = text.find("{", end)
    return found


def _end_of_object(text: str, begin: int) -> int | None:
    """Return where the object that begins here ends; quotes outside of it do not begin strings."""
    depth = 0
    for match in _BRACES.finditer(text, begin):
        if match[0] in "{}":
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                return match.end()
    return None


def _parses(text: str) -> bool:
    try:
        return isinstance(json.loads(text, object_pairs_hook=_once, parse_constant=_reject), dict)
    except (ValueError, RecursionError):
        return False


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _reject(constant: str) -> Any:
    raise ValueError(constant)


def _turns(content: str, request: Request) -> tuple[Turn, ...] | str:
    """Return the turns of an object; or what is wrong with its form."""
    try:
        form = answer_form(request.type).model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(form, ConversationForm):
        return form.turns or "turns: there are none"
    assert isinstance(form, DetailForm)
    question = request.question or ""
    return (
        Turn(question=question, answer=form.answer, kind="description", evidence=form.evidence),
    )


def _why(text: str, request: Request) -> str | None:
    """Return a better reason for a text without an object."""
    if is_refusal(text):
        return "REFUSAL"
    return "PROMPT_ECHO" if _echoes(text, request) else None


def _echoes(text: str, request: Request) -> bool:
    """Return whether the text holds a long piece of what was sent, or the schema itself."""
    if '"$defs"' in text or '"properties"' in text:
        return True
    lines = [line.strip() for line in request.context.splitlines()]
    # A line with its label is the prompt's own; a caption alone may be quoted.
    return any(_LABELLED.match(line) and line in text for line in lines) or any(
        len(line) >= ECHO and not _LABELLED.match(line) and line in text for line in lines
    )


def _rest(text: str) -> str:
    """Return what stands around the objects."""
    for begin, end in reversed(_objects(text)):
        text = text[:begin] + text[end:]
    return text


def _refused(code: str, claim: str) -> Parsed:
    check = Check(rule="reading", verdict="contradicted", code=code, claim=claim)
    return Parsed((), (check,))


def _note(claim: str) -> Check:
    return Check(rule="reading", verdict="unknown", claim=claim)


_THINKING: Final = re.compile(
    r"(?:<(think|thinking|thought|reasoning)>.*?</\1>"
    r"|(?:(?!<(?:think|thinking|thought|reasoning)>).)*?</(?:think|thinking|thought|reasoning)>)",
    re.DOTALL | re.IGNORECASE,
)
_FENCE: Final = re.compile(r"```[a-zA-Z]*\s*\{.*\}\s*```", re.DOTALL)
_BRACES: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[{}]', re.DOTALL)
_TRAILING_COMMA: Final = re.compile(r",(\s*[\]}])")
_LABELLED: Final = re.compile(r"[cb]\d+[:.)]? \S")
