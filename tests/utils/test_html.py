"""Pages are self-contained, and no value of a template can change the page around it."""

import base64
import hashlib
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from vlm_sft.utils.html import data_uri, embedded_image, page, render_page, section
from vlm_sft.utils.output_files import has_mark

HOSTILE = "</main><script>alert(1)</script>\x1b[2J\u202e"
ESCAPED = "&lt;/main&gt;&lt;script&gt;alert(1)&lt;/script&gt;␛[2J\\u202e"


def report(**values: object) -> str:
    """Render the quickstart's page, whose values all come from outside."""
    needed: dict[str, object] = {
        "headline": [],
        "images": [],
        "results": [],
        "curves": "",
        "seconds": {},
        "total_time": "",
        "versions": [],
        "credits": [],
    }
    return render_page(
        "vlm_sft.inspection",
        "demo_report.html",
        title=HOSTILE,
        lead=HOSTILE,
        command="report",
        **(needed | values),
    )


def test_every_value_of_a_template_is_escaped() -> None:
    html = report(
        headline=[(HOSTILE, HOSTILE, HOSTILE)],
        versions=[{"software": HOSTILE, "version": HOSTILE}],
        seconds={HOSTILE: HOSTILE},
        credits=[HOSTILE],
    )
    assert "<script" not in html and "\x1b" not in html and "\u202e" not in html
    # title twice, lead, headline, versions, phase and time, credits
    assert html.count(ESCAPED) == 3 + 3 + 2 + 2 + 1


def test_markup_is_not_escaped_again() -> None:
    assert '<i class="x">' in report(credits=[Markup('<i class="x">')])


def test_a_template_without_one_of_its_values_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="headline"):
        render_page("vlm_sft.inspection", "demo_report.html", title="", lead="", command="report")


def test_only_the_script_of_the_page_may_run() -> None:
    html = page("t", "l", [], script="alert(1 < 2);")
    (script,) = re.findall("<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert script == "alert(1 < 2);"
    policy = f"img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f"default-src 'none'; {policy}" in html
    assert "script-src" not in page("t", "l", [])


def test_a_page_of_finished_html_keeps_it_and_has_the_mark_of_its_command(tmp_path: Path) -> None:
    body = [section("a < b", "<p>c</p>"), embedded_image(b"png", "curve", 'a "graph"')]
    path = tmp_path / "page.html"
    path.write_text(page("t", "l", body, style=".x{color:red}", command="show"), encoding="utf-8")
    html = path.read_text(encoding="utf-8")
    assert '<section><h2>a &lt; b</h2><div class="card"><p>c</p></div></section>' in html
    assert f'<img class="curve" alt="a &#34;graph&#34;" src="{data_uri(b"png")}">' in html
    assert ".x{color:red}" in html
    assert has_mark(path, "show") and not has_mark(path, "report")
