"""METEOR of captions, by the Java program that the COCO caption evaluation code uses."""

import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Final

from vlm_sft.errors import UserError
from vlm_sft.utils.progress import track

_OPTIONS: Final = ("-", "-", "-stdio", "-l", "en", "-norm")
_JAR: Final = "meteor-1.5.jar"


def score_meteor(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[float, list[float]]:
    """Return METEOR 1.5 of the set and of each caption (Denkowski and Lavie 2014).

    The program and its paraphrases are those in the package pycocoevalcap; it takes 2 GB of memory.

    Args:
        captions: Tokens of each caption.
        references: Tokens of each reference of each caption.

    Raises:
        UserError: Java or the package is missing, or the program fails.
    """
    package = find_spec("pycocoevalcap")
    if shutil.which("java") is None or package is None:
        missing = "Java" if shutil.which("java") is None else "the package pycocoevalcap"
        raise UserError(
            f"--meteor needs {missing}, which is not installed; install it with "
            "`apt-get install default-jre-headless` or `pip install pycocoevalcap`"
        )
    folder = Path(next(iter(package.submodule_search_locations or ["."]))) / "meteor"
    with subprocess.Popen(
        ["java", "-jar", "-Xmx2G", _JAR, *_OPTIONS],
        cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as program:  # fmt: skip
        assert program.stdin is not None and program.stdout is not None
        try:
            return _talk(program.stdin, program.stdout, captions, references)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--meteor: the program {folder / _JAR} ended early or gave no number "
                f"({error or 'no output'}); does Java have 2 GB of memory?"
            ) from None
        finally:
            program.kill()


def _talk(
    to: IO[bytes],
    back: IO[bytes],
    captions: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
) -> tuple[float, list[float]]:
    """Send each caption, then all statistics, and read the scores."""

    def ask(line: str) -> str:
        to.write(line.encode() + b"\n")
        to.flush()
        return back.readline().decode().strip()

    statistics = [
        ask(" ||| ".join(["SCORE", *map(_text, group), _text(caption)]))
        for caption, group in track(
            zip(captions, references, strict=True), len(captions), "computing METEOR"
        )
    ]
    first = ask(" ||| ".join(["EVAL", *statistics]))
    scores = [float(first), *(float(back.readline()) for _ in statistics)]
    return scores[-1], scores[:-1]


def _text(tokens: Sequence[str]) -> str:
    """Return the text of tokens, without the program's separator and with at least one word."""
    return " ".join(" ".join(tokens).replace("|", " ").split()) or "."
