"""Every command in the documents is right, and runs unless its block says what it needs."""

from pathlib import Path

import pytest

from tests.documents import (
    NEEDS,
    PAGES,
    Command,
    blocks,
    commands,
    extras,
    known_extras,
    parse,
    prepare,
    run,
)
from tests.train.tiny import reset_accelerate

RUNNABLE = [
    page
    for page in PAGES
    if any(not block.needs for block in blocks(page)) and page != "docs/python-api.md"
]
"""Pages with blocks that are run; `tests/commands/test_api.py` runs those of the Python API."""

RUNS = {
    "README.md": {},
    "docs/evaluation.md": {"runs/stage2": "full"},
    "docs/report.md": {"runs/stage2_lora": "lora", "runs/lora": "lora", "runs/qlora": "full"},
    "docs/tutorials/one-gpu.md": {"runs/one-gpu/stage2_lora": "lora"},
    "docs/tutorials/finetune-llava.md": {"runs/tiny/stage2": "full"},
}
"""Runs that a page's commands name, by their place: `full` and `lora` of tests/conftest.py."""


def test_the_pages_have_commands() -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) > 60 and len(RUNNABLE) > 8


@pytest.mark.parametrize("page", PAGES)
def test_a_command_of_this_project_has_the_arguments_that_it_is_shown_with(page: str) -> None:
    for command, needs in commands(page):
        assert not needs or set(needs.split(", ")) <= NEEDS, f"{page}: unknown need {needs!r}"
        if command.module:
            parse(command.arguments)
        elif command.words[:2] == ["pip", "install"]:
            assert extras(command.words[-1]) <= known_extras()
        else:
            assert needs or command.words[0] == "cp", (
                f"{page}: {command.words[0]} is neither run nor marked with what it needs"
            )


def test_a_wrong_option_or_an_unmarked_program_would_be_found() -> None:
    with pytest.raises(ValueError, match="unknown option"):
        parse(Command.of("vlm-sft show c.yaml --htm page.html").arguments)
    with pytest.raises(AssertionError, match="not run by a test"):
        run(Command.of("tensorboard --logdir runs"), Path())
    shown = Command.of("A_B=1 python -m data_tools.mix configs/mix.yaml   # a comment")
    assert shown.variables == {"A_B": "1"} and shown.arguments == [
        "data",
        "mix",
        "configs/mix.yaml",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE)
def test_the_blocks_of_a_page_run_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    runs = {
        place: request.getfixturevalue(f"{kind}_run") for place, kind in RUNS.get(page, {}).items()
    }
    prepare(tmp_path, runs)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    for block in blocks(page):
        if block.needs:
            continue
        if block.language == "python":
            exec(compile(block.body, page, "exec"), names)
            continue
        for line in block.commands:
            assert run(Command.of(line), tmp_path) == 0, line
    reset_accelerate()
