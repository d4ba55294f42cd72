"""A server cannot get the key onto the terminal or into a file, in whatever form it repeats it."""

import base64
import html
import json
import logging
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from data_tools.instruct.__main__ import main as instruct
from data_tools.instruct.generate import command as generating
from data_tools.instruct.generate.teachers.secrets import REMOVED, Remover
from tests.data_tools.asked import planned
from tests.data_tools.teacher_server import Act, Handler, Received, served
from vlm_sft.config import loading as settings
from vlm_sft.errors import UserError

KEY = "sk-canary-0123456789_do/not+show"

FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "percent": lambda key: quote(key, safe=""),
    "percent twice": lambda key: quote(quote(key, safe=""), safe=""),
    "every letter percent": lambda key: "".join(f"%{ord(c):02x}" for c in key),
    "json escapes": lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
    "one json escape": lambda key: key.replace("c", "\\u0063", 1).replace("/", "\\/"),
    "html": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "hexadecimal": lambda key: key.encode().hex(),
    "two lines": lambda key: f"{key[:9]}\n{key[9:]}",
    "invisible letters": "\u200b".join,
    "two strings": lambda key: f'{key[:9]}" + "{key[9:]}',
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_secret_is_removed(form: str) -> None:
    cleaned = Remover(KEY).from_text(f"a {FORMS[form](KEY)} b")
    assert cleaned == f"a {REMOVED} b"


@pytest.mark.parametrize("before", ["", "B", "Be", "Bearer "])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64_of_the_secret_is_removed_wherever_it_begins(
    before: str, encode: Callable[[bytes], bytes]
) -> None:
    whole = encode(f"{before}{KEY} end".encode()).decode()
    cleaned = Remover(KEY).from_text(whole)
    assert REMOVED in cleaned
    rest = "".join(cleaned.split(REMOVED))
    assert len(rest) < len(whole) / 2


def test_other_text_stays_as_it_is_and_long_texts_take_no_time() -> None:
    remover = Remover(KEY)
    for text in ("sk-canary and nothing else", "\\" * 50_000, "s" * 50_000, " " * 50_000):
        assert remover.from_text(text) == text
    assert Remover("short").from_text("short") == "short"
    assert Remover(None).from_text("none") == "none"
    data = "\xff\xfe".encode("latin-1") + f"x{KEY}".encode("utf-16-le")
    assert KEY.encode("utf-16-le") not in remover.from_bytes(data)
    assert remover.from_bytes(b"\x80abc") == b"\x80abc"


def everywhere(form: str) -> Callable[[Received], Act]:
    """A server that puts the key into status line, every header, body, error and redirect."""
    told = FORMS[form](KEY).replace("\n", " ")
    safe = html.escape(told, quote=False).encode("ascii", "xmlcharrefreplace").decode()

    def script(received: Received) -> Act:
        status = (200, 200, 429, 500, 400)[min(received.times - 1, 4)]
        kind = f"text/{told}" if received.times == 1 else f"application/json; {told}"

        def act(handler: Handler) -> None:
            error = {"error": {"message": told, "code": told, "param": told, "type": told}}
            body = f'{{"x": "{told}", "choices": []}}' if status == 200 else json.dumps(error)
            data = body.encode()
            handler.send_response(status, safe)
            for name, value in (
                ("Content-Type", kind), ("Content-Length", str(len(data))), ("X-Key", told),
                ("Location", f"http://127.0.0.1/{told}"), ("Set-Cookie", f"k={told}"),
                ("X-Request-Id", told), ("Retry-After", "0"),
            ):  # fmt: skip
                plain = value.encode("ascii", "xmlcharrefreplace").decode()
                handler.send_header(name, plain)
            handler.end_headers()
            handler.wfile.write(data)

        return act

    return script


@pytest.mark.parametrize("form", ["plain", "percent twice", "json escapes", "one json escape"])
def test_a_server_that_repeats_the_key_everywhere_gets_it_nowhere(
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with served(everywhere(form)) as server, caplog.at_level(logging.DEBUG):
        config, _ = planned(
            tmp_path, 1, kind="openai", base_url=server.url, structured="none",
            api_key_env="TEACHER_KEY", backoff_seconds=0.01,
        )  # fmt: skip
        with pytest.raises((SystemExit, UserError)):
            generating.command(config)
    assert any(received.times > 3 for received in server.received)
    printed = capsys.readouterr()
    told = (
        printed.out
        + printed.err
        + "".join(
            path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()
        )
    )
    openai_logs = "".join(r.getMessage() for r in caplog.records if r.name.startswith("openai"))
    for text in (told, openai_logs):
        assert KEY not in text and FORMS[form](KEY) not in text
        assert "canary" not in text.replace("[key removed]", "")


@pytest.mark.parametrize(
    "url",
    [
        f"https://host/v1?api_key={KEY}",
        f"https://user:{KEY}@host/v1",
        f"https://{KEY}@host/v1",
        f"https://host/v1#{KEY}",
        f"ftp://host/{KEY}",
        f"http://elsewhere.example/{KEY}",
        KEY,
    ],
)
def test_a_refused_address_is_not_repeated(tmp_path: Path, url: str) -> None:
    config, run = planned(tmp_path / "run", 1, kind="openai", base_url=url)
    with pytest.raises(UserError) as told:
        generating.command(config)
    assert "canary" not in str(told.value)
    if any(sign in url for sign in "@?#"):
        path = tmp_path / "given.yaml"
        path.write_text(settings.dump(config))
        with pytest.raises(UserError, match="not shown") as told:
            instruct(["plan", str(path)])
        assert "canary" not in str(told.value) and not run.config.exists()
