"""A teacher's text becomes turns, or is refused with a code."""

import json

import pytest

from data_tools.instruct.schema import Answer, Request, SampleType, Shown
from data_tools.instruct.verify import reasons
from data_tools.instruct.verify.parse_answer import read_turns

CONTEXT = 'CAPTIONS\nc1: "A dog sleeps on a couch."\n\nOBJECTS\nb1: dog [0.1, 0.2, 0.5, 0.9]'
TURN = {"question": "What sleeps?", "answer": "A dog {x}.", "kind": "object", "evidence": ["c1"]}
GOOD = json.dumps({"turns": [TURN]})


def read(text: str, finish: str | None = "stop", sample_type: SampleType = "conversation"):
    request = Request(
        id="r", sample_id="s", image=1, type=sample_type, number=0, template="t",
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


@pytest.mark.parametrize(
    "thinking",
    [
        '<think>\nLet me look. {"turns": [] }\n</think>\n\n',
        "<thinking>Maybe {x} or I'm sorry, I cannot.</thinking>",
        'The box says {"a": 1}.</think>\n',
    ],
)
@pytest.mark.parametrize("wrapped", [GOOD, f"```json\n{GOOD}\n```"])
def test_braces_and_words_of_thinking_are_no_part_of_the_answer(
    thinking: str, wrapped: str
) -> None:
    parsed = read(thinking + wrapped)
    assert [turn.answer for turn in parsed.turns] == ["A dog {x}."]
    assert parsed.checks[0].claim == "thinking before the answer"


def test_an_answer_that_only_mentions_the_end_of_thinking_is_read_whole() -> None:
    text = GOOD.replace("A dog {x}.", "A sign says </think>.")
    assert [turn.answer for turn in read(text).turns] == ["A sign says </think>."]


def test_thinking_without_an_answer_is_an_empty_answer() -> None:
    assert reasons(read(f"<think>{GOOD}</think>").checks) == ("ANSWER_EMPTY",)


def test_quotes_in_the_words_around_an_object_do_not_hide_it() -> None:
    assert len(read(f'The 5" plate: {GOOD}').turns) == 1
