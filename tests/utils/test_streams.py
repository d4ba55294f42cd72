"""No encoding of the standard streams and no bytes of an argument end a command in a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_sft.errors import UserError, as_text

ROOT = Path(__file__).parent.parent.parent

COMMAND = """
import sys
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import as_text

def main(argv):
    print("caf\\u00e9 \\u27e6", *argv)
    print("line:", as_text(sys.stdin.readline().strip(), "line"))
    print("caf\\u00e9", file=sys.stderr)
    return 0

run_command(main)
"""


def run(
    *arguments: bytes, line: bytes = b"ok\n", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable.encode(), b"-c", COMMAND.encode(), *arguments],
        input=line,
        capture_output=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", **environment},
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONUTF8": "1"},
    ],
    ids=str,
)
def test_text_that_an_encoding_cannot_hold_is_escaped(environment: dict[str, str]) -> None:
    done = run("ö".encode(), b"caf\xe9", line="Größe\n".encode(), **environment)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(b"caf") and b"Traceback" not in done.stderr
    if environment.get("PYTHONIOENCODING") == "ascii":
        assert first == rb"caf\xe9 \u27e6 \xf6 caf\udce9"
        assert second == rb"line: Gr\xf6\xdfe"


def test_a_line_that_is_not_utf_8_is_one_sentence() -> None:
    done = run(line=b"caf\xe9\n", PYTHONUTF8="1")
    assert done.returncode == 2
    assert b"error VS302: line: 'caf\\udce9' is not UTF-8 text; give it in UTF-8" in done.stderr


def test_bytes_of_utf_8_that_python_kept_apart_are_put_together() -> None:
    kept = "Größe".encode().decode("ascii", "surrogateescape")
    assert as_text(kept, "--prompt") == "Größe" == as_text("Größe", "--prompt")
    with pytest.raises(UserError, match=r"--prompt: .* is not UTF-8 text"):
        as_text("caf\udce9", "--prompt")
    with pytest.raises(UserError, match=r"--prompt: .* is not UTF-8 text"):
        as_text("\ud800", "--prompt")


def test_closed_streams_are_no_error() -> None:
    command = f"{sys.executable} -c '{COMMAND}' <&- >&- 2>&-"
    done = subprocess.run(command, shell=True, check=False, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


def show(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "vlm_sft.show", *arguments],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )


def test_show_prints_text_and_json_on_an_ascii_stdout(tmp_path: Path) -> None:
    records = tmp_path / "records.json"
    turns = [{"from": "human", "value": "Größe?"}, {"from": "gpt", "value": "日本語 ⟦"}]
    records.write_text(json.dumps([{"id": "r1", "conversations": turns}]), encoding="utf-8")
    options = ["--records", str(records), "--tokenizer", "bytes", "--template", "chatml"]
    done = show(*options, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert rb"Gr\xf6\xdfe?" in done.stdout and rb"\u65e5\u672c" in done.stdout
    done = show(*options, "--json", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and json.loads(done.stdout)["id"] == "r1"
