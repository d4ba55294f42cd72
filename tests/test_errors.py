"""Errors keep their words and their parts wherever they travel, and commands end with a code."""

import pickle

import pytest

from vlm_sft.errors import (
    CheckpointError,
    ConfigError,
    ImageError,
    RecordError,
    UserError,
    run_command,
)


def test_a_record_error_comes_back_from_pickle_as_it_was() -> None:
    error = RecordError("no_answer", "is it so?", record_id="r'1", where="data.json:3")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is RecordError
    assert str(back) == str(error) == 'data.json:3: record "r\'1": is it so?'
    assert (back.reason, back.record_id, back.where) == ("no_answer", "r'1", "data.json:3")


def test_an_image_error_comes_back_from_pickle_as_it_was() -> None:
    back = pickle.loads(pickle.dumps(ImageError("image_broken", "a.jpg: cut off")))
    assert (type(back), str(back), back.reason) == (ImageError, "a.jpg: cut off", "image_broken")


@pytest.mark.parametrize("kind", [UserError, ConfigError, CheckpointError])
def test_plain_user_errors_survive_pickle_too(kind: type[UserError]) -> None:
    assert str(pickle.loads(pickle.dumps(kind("one sentence")))) == "one sentence"


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("what; what to do"), 2, "error: what; what to do\n"),
        (OSError(28, "No space left on device", "runs/a"), 2, "error: runs/a: No space left on de"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_commands_end_in_one_line_and_a_code(
    raised: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: object) -> int:
        raise raised

    with pytest.raises(SystemExit) as stopped:
        run_command(main, [])
    assert stopped.value.code == code
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == bool(line)


def test_a_bug_keeps_its_traceback() -> None:
    def main(argv: object) -> int:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        run_command(main, [])
