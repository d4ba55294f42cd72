"""Answers are kept once, found again by their request, and survive whatever ends a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.instruct.generate.answers import AnswerWriter, Claims, read_answers
from data_tools.instruct.schema import Answer
from vlm_sft.errors import UserError


def answer(number: int, text: str = "text") -> Answer:
    return Answer(request=f"{number:064x}", teacher="rules", text=text)


def write(folder: Path, *answers: Answer) -> Path:
    writer = AnswerWriter(folder)
    for one in answers:
        writer.write(one)
    writer.close()
    return writer.path


def test_a_folder_that_is_not_there_holds_no_answers(tmp_path: Path) -> None:
    assert len(read_answers(tmp_path / "none")) == 0


def test_every_answer_is_found_by_its_id_and_others_are_not(tmp_path: Path) -> None:
    write(tmp_path, *(answer(i, f"text {i}") for i in range(100)))
    answers = read_answers(tmp_path)
    assert [answers[f"{i:064x}"].text for i in range(100)] == [f"text {i}" for i in range(100)]
    assert list(answers) == [f"{i:064x}" for i in range(100)]
    assert f"{100:064x}" not in answers and answers.get(f"{100:064x}") is None


def test_what_is_appended_meanwhile_is_taken_in(tmp_path: Path) -> None:
    writer = AnswerWriter(tmp_path)
    answers = read_answers(tmp_path)
    writer.write(answer(1))
    assert f"{1:064x}" not in answers
    answers.refresh()
    assert f"{1:064x}" in answers and len(answers) == 1


def test_two_processes_never_append_to_one_file(tmp_path: Path) -> None:
    one, other = AnswerWriter(tmp_path), AnswerWriter(tmp_path)
    assert (one.path.name, other.path.name) == ("part-00001.jsonl", "part-00002.jsonl")
    one.close()
    assert AnswerWriter(tmp_path).path == one.path


@given(cut=st.integers(min_value=1))
def test_a_last_line_cut_anywhere_costs_that_line_alone(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("answers")
    path = write(folder, answer(1), answer(2))
    line = len(path.read_bytes()) // 2
    cut = cut % line or 1
    os.truncate(path, 2 * line - cut)
    assert list(read_answers(folder)) == [f"{1:064x}"]
    writer = AnswerWriter(folder)
    is_whole = cut == 1
    assert writer.torn == (0 if is_whole else line - cut)
    writer.write(answer(3))
    kept = [1, 2, 3] if is_whole else [1, 3]
    assert list(read_answers(folder)) == [f"{number:064x}" for number in kept]


def test_a_last_line_of_zeros_after_a_power_failure_is_removed(tmp_path: Path) -> None:
    path = write(tmp_path, answer(1))
    for torn in (b"\0" * 50, b'{"requ' + b"\0" * 50, b'{"request":"ab' + b"\0" * 50):
        with path.open("ab") as file:
            file.write(torn)
        writer = AnswerWriter(tmp_path)
        writer.close()
        assert writer.torn == len(torn)
        assert list(read_answers(tmp_path)) == [f"{1:064x}"]


def test_a_last_line_of_others_behind_answers_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, answer(1))
    content = path.read_bytes() + b"my last line"
    path.write_bytes(content)
    with pytest.raises(UserError, match="a line begins with b'my last line', expected"):
        AnswerWriter(tmp_path)
    assert path.read_bytes() == content


def test_of_two_answers_to_one_request_the_files_order_decides_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a", answer(1, "first"), answer(2))
    write(tmp_path / "b", answer(1, "second"))
    chosen = []
    for names in (("part-00001", "part-00002"), ("part-00002", "part-00001")):
        both = tmp_path / names[0] / "both"
        both.mkdir(parents=True)
        for source, name in zip("ab", names, strict=True):
            content = (tmp_path / source / "part-00001.jsonl").read_bytes()
            (both / f"{name}.jsonl").write_bytes(content)
        answers = read_answers(both)
        assert (len(answers), answers.lines, answers.duplicates) == (2, 3, 1)
        assert sorted(answers) == [f"{1:064x}", f"{2:064x}"]
        chosen.append(answers[f"{1:064x}"].text)
    assert chosen[0] == chosen[1]


def test_a_damaged_line_is_told_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, answer(1), answer(2))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"request":"x","broken\n' + lines[1])
    with pytest.raises(UserError, match=f"part-00001.jsonl: the line at byte {len(lines[0])}"):
        read_answers(tmp_path)
    path.write_bytes(lines[0] + lines[1].replace(b'"text":', b'"txt":'))
    with pytest.raises(UserError, match="is not an answer"):
        read_answers(tmp_path)[f"{2:064x}"]


def test_a_full_disk_leaves_no_part_of_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = AnswerWriter(tmp_path)
    writer.write(answer(1))
    before = writer.path.read_bytes()
    real = os.write
    room = iter([100])

    def almost_full(descriptor: int, data: bytes) -> int:
        left = next(room, 0)
        if not left:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:left])

    monkeypatch.setattr(os, "write", almost_full)
    with pytest.raises(OSError, match="No space left"):
        writer.write(answer(2))
    assert writer.path.read_bytes() == before


CLAIMING = """
import sys, time
from pathlib import Path
from data_tools.instruct.generate.answers import Claims
claims = Claims(Path(sys.argv[1]))
print(claims.take("a"), flush=True)
time.sleep(60)
"""


def test_a_claim_holds_against_other_processes_until_its_own_is_killed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", CLAIMING, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        mine = Claims(tmp_path)
        assert not mine.take("a") and mine.take("b")
        other.kill()
        other.wait()
        assert mine.take("a")
        mine.release("a")
