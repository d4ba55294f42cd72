"""Write `ifeval.json`: what lm-eval's IFEval code says about random answers.

    pip install lm-eval==0.4.13 langdetect immutabledict nltk     # in another environment
    python tests/golden/scores/ifeval.py > tests/golden/scores/ifeval.json

NLTK's Punkt data is not in its package: sentence counts are left out, and words in capitals are
found with its tokenizer alone (`preserve_line`).
"""

import importlib.util
import json
import random
import sys
import types
from pathlib import Path

TEXTS = [
    "My answer is yes.", "THE DOG RUNS THROUGH THE GARDEN AND PLAYS WITH THE CHILDREN.",
    "the dog runs through the garden and plays with the children.", '"A quoted answer."',
    "<<A title>>\nA dog, a cat and [name] with [place].", "* one\n* two\n- three\nend",
    "*bold* and **very bold** and ** **", '```json\n{"a": [1, 2]}\n```', '{"a": 1,}', "P.S. Hello",
    "First part.\n\nSecond part, with a DOG.\n\n\n\nThird.", "one *** two *** three", "*** a *** b",
    "SECTION 1 a\nSECTION 2 b", "a\n******\nb", "a ****** a", "Hello there\nline two\nthe end",
    "", "   ",
    "Is there anything else I can help with?", "P.P.S. more\np. s. less", "Ünïcödé ß 日本",
    "dogs DOG Dog dog-like doggy", "Sure! Here it is:\n\nNo commas here\n\nHope it helps, bye",
]  # fmt: skip


def instruction(rng: random.Random) -> tuple[str, dict[str, object]]:
    relation = rng.choice(["at least", "less than"])
    count = rng.randint(1, 4)
    return rng.choice(
        [
            ("keywords:existence", {"keywords": rng.sample(["dog", "cat", "end", "the"], 2)}),
            ("keywords:frequency", {"keyword": "dog", "frequency": count, "relation": relation}),
            ("keywords:forbidden_words", {"forbidden_words": rng.sample(["dog", "end", "a"], 2)}),
            ("keywords:letter_frequency",
             {"letter": "d", "let_frequency": count, "let_relation": relation}),
            ("length_constraints:number_words", {"num_words": 3 * count, "relation": relation}),
            ("length_constraints:number_paragraphs", {"num_paragraphs": count}),
            ("length_constraints:nth_paragraph_first_word",
             {"num_paragraphs": 3, "nth_paragraph": rng.randint(1, 3), "first_word": "second"}),
            ("detectable_content:number_placeholders", {"num_placeholders": count}),
            ("detectable_content:postscript",
             {"postscript_marker": rng.choice(["P.S.", "P.P.S"])}),
            ("detectable_format:number_bullet_lists", {"num_bullets": count}),
            ("detectable_format:constrained_response", {}),
            ("detectable_format:number_highlighted_sections", {"num_highlights": count}),
            ("detectable_format:multiple_sections",
             {"section_spliter": "SECTION", "num_sections": count}),
            ("detectable_format:json_format", {}),
            ("detectable_format:title", {}),
            ("combination:two_responses", {}),
            ("combination:repeat_prompt", {"prompt_to_repeat": "Hello there"}),
            ("startend:end_checker", {"end_phrase": rng.choice(["the end", "help with?", "bye"])}),
            ("startend:quotation", {}),
            ("change_case:capital_word_frequency",
             {"capital_frequency": count, "capital_relation": relation}),
            ("change_case:english_capital", {}),
            ("change_case:english_lowercase", {}),
            ("punctuation:no_comma", {}),
        ]
    )  # fmt: skip


def questions(count: int, seed: int) -> list[dict[str, object]]:
    """Return random answers with random instructions."""
    rng = random.Random(seed)
    found: list[dict[str, object]] = []
    for key in range(count):
        asked = dict(instruction(rng) for _ in range(rng.randint(1, 3)))
        answer = "\n".join(rng.sample(TEXTS, rng.choice([1, 1, 2, 3])))
        found.append(
            {"key": key, "prompt": "", "answer": answer,
             "instruction_id_list": list(asked), "kwargs": list(asked.values())}
        )  # fmt: skip
    return found


def official(rows: list[dict[str, object]]) -> list[list[list[bool]]]:
    """Return which instructions each answer follows, strictly and loosely."""
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    nltk.data.find = lambda *_: None
    tokenize = nltk.word_tokenize
    nltk.word_tokenize = lambda text: tokenize(text, preserve_line=True)
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "ifeval"
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    from lm_eval.tasks.ifeval import utils

    found = []
    for row in rows:
        example = utils.InputExample(
            row["key"], row["instruction_id_list"], row["prompt"], row["kwargs"]
        )
        found.append(
            [
                test(example, row["answer"]).follow_instruction_list
                for test in (
                    utils.test_instruction_following_strict,
                    utils.test_instruction_following_loose,
                )
            ]
        )
    return found


if __name__ == "__main__":
    print(json.dumps(official(questions(600, seed=5))))
