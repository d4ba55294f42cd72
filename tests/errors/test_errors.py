"""Errors keep words, parts and code wherever they travel; commands end in a line and a code."""

import copy
import errno
import pickle

import pytest

from vlm_sft.commands.run_command import run_command
from vlm_sft.data.text_encoder import UnencodableText
from vlm_sft.errors import (
    CheckpointError,
    ConfigError,
    ImageError,
    RecordError,
    TemplateError,
    UserError,
    code_of,
    is_disk_full,
)


def test_a_record_error_comes_back_from_pickle_as_it_was() -> None:
    error = RecordError("no_answer", "is it so?", record_id="r'1", where="data.json:3")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is RecordError
    assert str(back) == str(error) == 'data.json:3: record "r\'1": is it so?'
    assert (back.reason, back.record_id, back.where) == ("no_answer", "r'1", "data.json:3")
    assert str(back.code) == "VS312"


def test_an_image_error_comes_back_from_pickle_as_it_was() -> None:
    back = pickle.loads(pickle.dumps(ImageError("image_broken", "a.jpg: cut off")))
    assert (type(back), str(back), back.reason) == (ImageError, "a.jpg: cut off", "image_broken")
    assert str(back.code) == "VS204"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (UserError, "VS002"),
        (ConfigError, "VS001"),
        (CheckpointError, "VS100"),
        (TemplateError, "VS325"),
        (UnencodableText, "VS324"),
    ],
)
def test_plain_user_errors_keep_their_class_s_code_or_their_own(
    kind: type[UserError], code: str
) -> None:
    plain, named = kind("one sentence"), kind("one sentence", code="disk_full")
    for error, expected in ((plain, code), (named, "VS101")):
        for back in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert (type(back), str(back), str(back.code)) == (kind, "one sentence", expected)


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "disk_full"),
        (errno.EACCES, "not_permitted"),
        (errno.EROFS, "not_permitted"),
        (errno.EIO, "disk_error"),
        (errno.ESTALE, "disk_error"),
    ],
)
def test_what_the_system_refused_has_a_code(number: int, name: str) -> None:
    error = OSError(number, "refused", "a")
    assert code_of(error).name == name
    assert is_disk_full(error) == (name == "disk_full")


def test_other_errors_are_no_full_disk() -> None:
    assert not is_disk_full(UserError("no", code="disk_full")) and not is_disk_full(OSError("no"))


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("what; what to do"), 2, "error VS002: what; what to do\n"),
        (CheckpointError("none", code="checkpoints_all_damaged"), 2, "error VS110: none\n"),
        (ImageError("image_broken", "a.jpg: cut off"), 2, "error VS204: a.jpg: cut off\n"),
        (
            RecordError("empty_answer", "empty", record_id="r", where="a.json[3]"),
            2,
            "error VS311: a.json[3]: record 'r': empty\n",
        ),
        (OSError(28, "No space left", "runs/a"), 2, "error VS101: runs/a: No space left\n"),
        (OSError(5, "Input/output error", "runs/a"), 2, "error VS102: runs/a: Input/output error"),
        (OSError("odd"), 2, "error VS102: input/output: odd\n"),
        (PermissionError(13, "Permission denied", "runs"), 2, "error VS103: runs: Permission den"),
        (
            KeyboardInterrupt(),
            130,
            "stopped by Ctrl-C; files already saved, if any, are complete\n",
        ),
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


def test_one_of_several_processes_says_which_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")

    def fails(argv: object) -> int:
        raise UserError("no such thing")

    with pytest.raises(SystemExit) as ended:
        run_command(fails, [])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error VS002: rank 2 of 4: no such thing\n"
