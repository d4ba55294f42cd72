"""A suite's questions are read with their images and asked in a plan that never changes."""

from pathlib import Path
from typing import Any

import pytest

from vlm_sft.config.loading import parse
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.evaluation.suites.config import SuiteConfig, load_suite
from vlm_sft.evaluation.suites.tasks import Task, plan, read_task


def read(path: Path) -> list[Task]:
    suite = load_suite(path)
    return [read_task(task, seed=suite.seed) for task in suite.tasks]


def test_questions_have_ids_images_prompts_and_options(suite_file: Path) -> None:
    exists, counting, color, captions = read(suite_file)
    assert (len(exists.questions), len(exists.truth)) == (12, 12)
    first = exists.questions[0]
    assert (first.id, first.image, first.prompt) == ("0", "red.png", "Is it red?\nOne word.")
    assert [question.id for question in counting.questions] == ["red", "green", "blue", "gray"]
    asked = color.questions[0].prompt.splitlines()
    assert asked[0] == "Which color?" and {line[3:] for line in asked[1:]} == {
        "red", "green", "blue", "gray",
    }  # fmt: skip
    row = color.truth[0]
    assert row.values["choices"][row.values["answer"]] == "red"
    assert asked[1 + row.values["answer"]] == f"{'ABCD'[row.values['answer']]}. red"
    assert [(q.id, q.image, q.prompt) for q in captions.questions][:2] == [
        ("1", "red.png", "Describe it."), ("2", "green.png", "Describe it."),
    ]  # fmt: skip
    assert len(captions.truth) == 8


def test_every_question_is_planned_once_and_equal_prompts_are_asked_once(suite_file: Path) -> None:
    tasks = read(suite_file)
    batches = plan(tasks, seed=0, batch_size=5)
    asks = [(group, ask) for batch in batches for group in batch for ask in group.asks]
    keys = [key for _, ask in asks for key in ask.keys]
    assert len(keys) == len(set(keys)) == 3 * 12 + 3 * 4 + 4 + 3 * 4
    assert all(sum(len(group.asks) for group in batch) <= 5 for batch in batches)
    blank = [(ask.prompt, ask.max_tokens) for group, ask in asks if group.shown.change == "blank"]
    assert len(blank) == len(set(blank)) == 4  # three colors, and the caption
    assert plan(read(suite_file), seed=0, batch_size=5) == batches
    for group, ask in asks:
        for key in ask.keys:
            own = next(q.image for t in tasks for q in t.questions
                       if (t.config.name, q.id) == (key.task, key.id))  # fmt: skip
            shown = None if group.shown.path is None else group.shown.path.name
            expected = {"blank": shown is None, "shuffled": shown not in (None, own)}
            assert expected.get(key.condition, shown == own)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (0, {"kind": "popes"}, "tasks.0.kind: expected one of pope"),
        (0, {"conditions": ["right", "right"]}, "right is there twice"),
        (0, {"images": None}, "a task without `images` has only `right`"),
        (0, {"name": "a b"}, "tasks.0.name"),
        (0, {"limit": 3}, "tasks.0.limit"),
        (1, {"name": "exists"}, "two tasks are named exists"),
        (0, {"scoring": {"reading": "last"}}, "tasks.0.scoring.reading"),
    ],
)
def test_wrong_settings_are_refused(
    suite_tree: dict[str, Any], task: int, change: dict[str, Any], message: str
) -> None:
    suite_tree["tasks"][task] |= change
    with pytest.raises(ConfigError, match="suite") as caught:
        parse(SuiteConfig, suite_tree, "suite.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (0, {"files": ["{dir}/captions.json"]}, "has no text under question"),
        (0, {"images": "{dir}"}, "no such image"),
        (3, {"prompt": None}, "set the task's `prompt`"),
        (0, {"files": ["{dir}/pope.jsonl", "{dir}/pope.jsonl"]}, "the id 0 appears twice"),
        (0, {"truth": ["{dir}/counts.json"]}, "no true answer belongs to a question of task"),
    ],
)  # fmt: skip
def test_questions_that_cannot_be_asked_are_refused(
    suite_tree: dict[str, Any], tmp_path: Path, task: int, change: dict[str, Any], message: str
) -> None:
    placed = {
        key: [name.format(dir=tmp_path) for name in value] if isinstance(value, list)
        else value and value.format(dir=tmp_path)
        for key, value in change.items()
    }  # fmt: skip
    suite_tree["tasks"][task] |= placed
    suite = parse(SuiteConfig, suite_tree, "suite.yaml")
    with pytest.raises(UserError) as caught:
        read_task(suite.tasks[task], seed=0)
    assert message in str(caught.value)
