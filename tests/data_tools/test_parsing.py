"""A teacher's text becomes turns, or is refused with a code."""

import json

import pytest

from data_tools.instruct.parsing import read_turns
from data_tools.instruct.schema import Answer, Request, SampleType, Shown
from data_tools.instruct.verification import reasons

CONTEXT = 'CAPTIONS\nc1: "A dog sleeps on a couch."\n\nOBJECTS\nb1: dog [0.1, 0.2, 0.5, 0.9]'
TURN = {"question": "What sleeps?", "answer": "A dog {x}.", "kind": "object", "evidence": ["c1"]}
GOOD = json.dumps({"turns": [TURN]})


def read(text: str, finish: str | None = "stop", sample_type: SampleType = "conversation"):
    request = Request(
        id="r", sample_id="s", picture=1, type=sample_type, number=0, template="t",
        template_sha256="", question="Describe it.", context=CONTEXT, parameters={}, shown=Shown(),
    )  # fmt: skip
    return read_turns(request, Answer(request="r", teacher="openai", text=text, finish=finish))


def test_strict_json_is_read_without_a_note() -> None:
    parsed = read(GOOD)
    assert [turn.answer for turn in parsed.turns] == ["A dog {x}."]
    assert parsed.checks == ()


def test_a_description_gets_the_question_that_was_asked() -> None:
    text = json.dumps({"answer": "A dog sleeps.", "evidence": ["b1"]})
    [turn] = read(text, sample_type="detail").turns
    assert (turn.question, turn.kind, turn.evidence) == ("Describe it.", "description", ("b1",))


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (f"```json\n{GOOD}\n```", "Markdown fences around the object"),
        (f"Here you are:\n{GOOD}", "text around the object"),
        (GOOD[:-2] + ",]}", "a comma before a closing bracket"),
    ],
)
def test_a_wrapping_is_read_through_and_noted(text: str, note: str) -> None:
    parsed = read(text)
    assert len(parsed.turns) == 1
    assert [(check.claim, check.code) for check in parsed.checks] == [(note, None)]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "ANSWER_EMPTY"),
        ("A dog sleeps.", "NOT_JSON"),
        (GOOD[:-1], "NOT_JSON"),
        (GOOD.replace('"turns": [', '"turns": [], "turns": ['), "NOT_JSON"),  # a key twice
        (f"{GOOD}\n{GOOD}", "SEVERAL_OBJECTS"),
        ('{"turns": []}', "WRONG_SCHEMA"),
        ('{"dialogue": []}', "WRONG_SCHEMA"),
        (GOOD.replace('"kind": "object"', '"kind": "colour"'), "WRONG_SCHEMA"),
        (GOOD.replace('["c1"]', '"c1"'), "WRONG_SCHEMA"),
        ("I'm sorry, but I can't help with that.", "REFUSAL"),
        (f"I cannot see the image. {GOOD}", "REFUSAL"),
        (CONTEXT, "PROMPT_ECHO"),
        ('{"$defs": {}, "properties": {}}', "PROMPT_ECHO"),
        ("[" * 100_000, "NOT_JSON"),
        ("{" * 100_000, "NOT_JSON"),
    ],
)
def test_what_is_not_exactly_one_object_of_the_form_is_refused(text: str, code: str) -> None:
    parsed = read(text)
    assert (parsed.turns, reasons(parsed.checks)) == ((), (code,))


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_an_answer_that_was_stopped_is_refused_even_where_it_parses(finish: str) -> None:
    assert reasons(read(GOOD, finish).checks) == ("ANSWER_CUT",)
