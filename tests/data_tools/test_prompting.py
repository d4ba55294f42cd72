import json
import re
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

import data_tools.instruct as instruct
from data_tools.instruct.plan.prompts import TYPES, Seed, make_templates, messages, seeds
from data_tools.instruct.schema import ConversationForm, Request, Shown, answer_form
from vlm_sft.errors import UserError

OURS = Path(next(iter(instruct.__path__))) / "prompts"
ALL_SEEDS = [(kind, seed) for kind in TYPES for seed in seeds(kind)]


def texts(seed: Seed) -> list[str]:
    answer = seed.answer
    return (
        [t.answer for t in answer.turns]
        if isinstance(answer, ConversationForm)
        else [answer.answer]
    )


def test_templates_begin_alike_and_say_what_was_looked_for() -> None:
    templates = make_templates(("dog", "cat"))
    assert list(templates) == list(TYPES)
    for name, template in templates.items():
        roles = [message["role"] for message in template["messages"]]
        assert roles == ["system"] + ["user", "assistant"] * (len(roles) // 2)
        assert "looked for each of these: dog, cat." in template["messages"][0]["content"]
        assert "{" + "categories" not in json.dumps(template["messages"])
        assert "{question}" not in json.dumps(template["messages"])
        for message in template["messages"][2::2]:
            answer_form(name).model_validate_json(message["content"])  # type: ignore[arg-type]
        assert template["answer_schema"]["additionalProperties"] is False
    assert len(set(templates["detail"]["questions"])) >= 16


@pytest.mark.parametrize("kind", TYPES)
def test_there_are_two_or_three_seed_examples_of_a_type(kind: Any) -> None:
    assert 2 <= len(seeds(kind)) <= 3


@pytest.mark.parametrize(("kind", "seed"), ALL_SEEDS)
def test_seed_examples_do_not_tell_where_they_know_from(kind: str, seed: Seed) -> None:
    for text in texts(seed):
        assert not re.search(
            r"\b(caption|box|label|coordinate|annotat|described as)|\d\.\d|\bb\d",
            text,
        )
        if kind != "reasoning":
            assert not re.search(r"\b(seem|appear|possibl|might|probabl)", text)


def test_every_seed_conversation_has_an_answer_of_no_or_cannot_be_told() -> None:
    for seed in seeds("conversation"):
        assert isinstance(seed.answer, ConversationForm)
        turns = seed.answer.turns
        assert 4 <= len(turns) <= 6
        denied = [t for t in turns if t.answer.startswith("No,") or t.kind == "cannot_tell"]
        assert denied and all(t.evidence == () for t in denied)
        assert all(t.evidence for t in turns if t not in denied)
        if not seed.image.boxes:
            assert not any(t.answer.startswith("No,") for t in turns), "absence is unknown"


def test_places_in_seed_examples_hold_in_their_boxes() -> None:
    """What the words of the seeds claim, by hand: the scenes must not drift away from them."""
    kitchen, stop = seeds("conversation")[0].image, seeds("conversation")[1].image
    [cat], [sandwich] = kitchen.of("cat"), kitchen.of("sandwich")
    left, right = kitchen.of("cup")
    assert left.right < cat.left and cat.right < right.left and cat.right < sandwich.left
    assert left.right < kitchen.width / 3 and right.left > kitchen.width * 2 / 3
    [bus], [light] = stop.of("bus"), stop.of("traffic light")
    assert bus.left > stop.width / 2 and light.right < bus.left
    assert light.bottom < stop.height / 4
    assert all(p.right < stop.width / 2 for p in stop.of("person"))
    assert len(stop.of("umbrella")) == 2 and any(p.crowd for p in stop.of("person"))
    assert not kitchen.of("bottle") and not stop.of("bicycle")


def test_a_request_ends_with_its_own_context() -> None:
    templates = make_templates(("dog",))
    request = Request(
        id="x", sample_id="y", image=1, type="detail", number=0, template="detail",
        template_sha256="", question="Q?", context="CONTEXT", parameters={}, shown=Shown(),
    )  # fmt: skip
    sent = messages(request, templates)
    assert sent[:-1] == templates["detail"]["messages"]
    assert sent[-1] == {"role": "user", "content": "CONTEXT"}


def own(tmp_path: Path) -> Path:
    return Path(copytree(OURS, tmp_path / "prompts"))


def test_own_prompts_are_used_and_any_change_of_them_changes_the_digest(tmp_path: Path) -> None:
    folder = own(tmp_path)
    before = make_templates(("dog",))
    assert make_templates(("dog",), folder=str(folder)) == before

    def changed(name: str, old: str, new: str) -> set[str]:
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        after = make_templates(("dog",), folder=str(folder))
        path.write_text(text)
        return {kind for kind in TYPES if after[kind]["sha256"] != before[kind]["sha256"]}

    assert changed("common.txt", "Plain", "Simple") == set(TYPES)
    assert changed("reasoning.txt", "step by step", "slowly") == {"reasoning"}
    assert changed("detail.txt", "Answer it", "Do answer it") == {"detail"}
    assert changed("questions.txt", "this picture", "the picture") == {"detail"}
    assert changed("seeds.json", "is grey.", "is quite grey.") == {"conversation"}
    assert make_templates(("cat",))["detail"]["sha256"] != before["detail"]["sha256"]
    assert make_templates(("dog",), decimals=3)["detail"]["sha256"] != before["detail"]["sha256"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("common.txt", None, "common.txt: there is no such file"),
        ("detail.txt", "text", "a line '---'"),
        ("detail.txt", "text\n---\nask", "with {question} in it"),
        ("reasoning.txt", "text\n---\n{question}", "without {question} in it"),
        ("questions.txt", "One?\nOne?", "each once, found 2 lines, 1 of them different"),
        ("seeds.json", "{", "seeds.json: Invalid JSON"),
        ("seeds.json", "{}", "seeds.json: scenes: Field required"),
    ],
)
def test_faulty_prompts_are_one_sentence(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    folder = own(tmp_path)
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        make_templates(("dog",), folder=str(folder))


def test_a_seed_that_cites_what_is_not_shown_is_refused(tmp_path: Path) -> None:
    folder = own(tmp_path)
    path = folder / "seeds.json"
    path.write_text(path.read_text().replace('["b2", "b5"]', '["b2", "b15"]'))
    with pytest.raises(UserError, match=r"conversation\[0\]: cites 'b15'"):
        make_templates(("dog",), folder=str(folder))
