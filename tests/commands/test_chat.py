"""Talking with a run: answers on stdout and nothing else there."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vlm_sft import chat
from vlm_sft.commands.run_command import run_command

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "configs" / "tiny" / "data" / "images"
RED, BLUE = str(IMAGES / "red-circle-0.png"), str(IMAGES / "blue-square-0.png")


def code_of(argv: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(chat.main, argv)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def talk(run: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return code_of([str(run), "--device", "cpu", "--max-new-tokens", "12", *options])


def test_only_the_answer_is_on_stdout(full_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [str(full_run), "--image", RED, "--image", BLUE, "--prompt", "Which color?"]
    assert code_of(argv) == 0
    out, err = capfd.readouterr()
    assert 1 < len(out.strip()) < 40 and out.endswith("\n") and out.count("\n") == 1
    assert "error" not in err


def test_a_talk_shows_images_forgets_and_ends(
    full_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"/image {RED}\nWhich color?\n\nWhich shape?\n/reset\nWhich shape?\n/quit\nunheard\n"
    assert talk(full_run, lines, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert "image 1 goes with the next question" in err
    assert "conversation cleared" in err
    assert err.count("> ") == 7


def test_a_talks_answers_are_those_of_its_whole_history(
    full_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm_sft.inference.loaded_model import LoadedModel

    asked: list[tuple[int, int]] = []
    stream = LoadedModel.stream

    def recorded(self: LoadedModel, conversation, **keys):  # type: ignore[no-untyped-def]
        asked.append((len(conversation.turns), len(conversation.images)))
        return stream(self, conversation, **keys)

    monkeypatch.setattr(LoadedModel, "stream", recorded)
    lines = f"Which color?\n/image '{BLUE}'\nAnd this?\n/reset\nWho?\n"
    assert talk(full_run, lines, monkeypatch, "--image", RED) == 0
    assert asked == [(1, 1), (3, 2), (1, 0)]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_slips_are_told_and_the_talk_goes_on(
    full_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"/imag {RED}\n/image gone.png\n/image\n/image 'open\n/image {RED}\nWhich color?\n"
    assert talk(full_run, lines, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "error VS002: /imag: unknown command; known: /image FILE, /reset, /quit\n" in err
    assert "gone.png" in err and "expected one file" in err and "No closing quotation" in err
    assert err.count("error VS") == 4
    assert "image 1 goes with the next question" in err
    assert len(out.splitlines()) == 1


def test_ctrl_c_stops_the_answer_and_not_the_talk(
    full_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm_sft.inference.loaded_model import LoadedModel

    calls: list[str] = []
    stream = LoadedModel.stream

    def interrupted(self: LoadedModel, conversation, **keys):  # type: ignore[no-untyped-def]
        calls.append(conversation.turns[-1].text)
        yield "half"
        if len(calls) == 1:
            raise KeyboardInterrupt
        assert len(conversation.turns) == 1  # the half answer was not said
        yield from stream(self, conversation, **keys)

    monkeypatch.setattr(LoadedModel, "stream", interrupted)
    assert talk(full_run, "Which color?\nWhich shape?\n", monkeypatch) == 0
    assert calls == ["Which color?", "Which shape?"]
    assert "(stopped; Ctrl-D quits)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--image", "gone.png"], "gone.png"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: expected 1 to 1000000"),
        (["--temperature", "-1"], "--temperature -1: expected 0, or 0.01 to 100"),
        (["--temperature", "1e-300"], "--temperature 1e-300: expected 0, or 0.01 to 100"),
        (["--temperature", "nan"], "--temperature nan: expected 0, or 0.01 to 100"),
        (["--temperature", "1e300"], "--temperature 1e300: expected 0, or 0.01 to 100"),
        (["--seed", "9" * 30], "expected 0 to 4294967295"),
        (["--max-new-tokens", "9" * 30], "expected 1 to 1000000"),
        (["--prompt", "x" * 100_000], "tokens, but the model has only 512 positions"),
        (["--device", "gpu"], "device 'gpu'"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
    ],
)
def test_wrong_arguments_end_with_one_sentence_and_2(
    options: list[str], sentence: str, full_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of([str(full_run), "--prompt", "x", *options]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error VS") and err.count("\n") == 1 and sentence in err
    assert out == ""


def test_an_answer_ends_where_the_positions_of_the_model_end(
    full_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(full_run), "--device", "cpu", "--temperature", "100", "--seed", "1"]
    assert code_of([*argv, "--prompt", "x" * 440, "--max-new-tokens", "100000"]) == 0
    assert len(capsys.readouterr().out) < 512


def test_a_checkpoint_that_is_not_there_ends_with_one_sentence_and_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of([str(tmp_path / "gone"), "--prompt", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error VS") and err.count("\n") == 1 and "no such folder" in err


def test_a_url_for_an_image_is_one_clear_sentence(
    full_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "https://example.org/cat.jpg"
    assert code_of([str(full_run), "--image", url, "--prompt", "What?"]) == 2
    sentence = f"the image '{url}' is a URL; images are not downloaded, give the path of a file"
    assert sentence in capsys.readouterr().err
    assert talk(full_run, f"/image {url}\n/image file://{RED}\n/quit\n", monkeypatch) == 0
    err = capsys.readouterr().err
    assert sentence in err and "image 1 goes with the next question" in err


def test_a_prompt_that_is_not_utf_8_is_one_sentence(
    full_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of([str(full_run), "--prompt", "caf\udce9"]) == 2
    assert "--prompt: 'caf\\udce9' is not UTF-8 text" in capsys.readouterr().err
