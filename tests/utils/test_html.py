"""Pages are self-contained, and no value of a template can change the page around it."""

import base64
import hashlib
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from vlm_sft.utils.html import data_uri, render_page
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
        "seconds": [],
        "savings": [],
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
        seconds=[{"name": HOSTILE, "time": HOSTILE, "percent": "1"}],
        savings=[HOSTILE],
        credits=[HOSTILE],
    )
    assert "<script" not in html and "\x1b" not in html and "\u202e" not in html
    # title twice, lead, headline, versions, phase and time, savings, credits
    assert html.count(ESCAPED) == 3 + 3 + 2 + 2 + 1 + 1


def test_markup_is_not_escaped_again() -> None:
    assert '<i class="x">' in report(credits=[Markup('<i class="x">')])


def test_a_template_without_one_of_its_values_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="headline"):
        render_page("vlm_sft.inspection", "demo_report.html", title="", lead="", command="report")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a package with a template, a style sheet and a script."""
    files = {
        "__init__.py": "",
        "templates/own.html": """{% extends "page.html" %}
            {% from "macros.html" import figure, section %}
            {% block body %}{% call section("a < b") %}<p>c</p>{% endcall %}
            {{ figure(image, "curve", 'a "graph"') }}{% endblock %}""",
        "templates/own.css": ".x{color:red}",
        "templates/own.js": "alert(1 < 2);",
    }
    for name, text in files.items():
        path = tmp_path / "package_with_a_page" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "package_with_a_page"


def test_only_the_script_of_the_page_may_run(package: str) -> None:
    values = {"title": "t", "lead": "l", "command": "show", "image": data_uri(b"png")}
    html = render_page(package, "own.html", script="own.js", **values)
    (script,) = re.findall("<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert script == "alert(1 < 2);"
    policy = f"img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f"default-src 'none'; {policy}" in html
    assert "script-src" not in render_page(package, "own.html", **values)


def test_a_page_has_the_shared_parts_and_the_mark_of_its_command(
    package: str, tmp_path: Path
) -> None:
    image = data_uri(b"png")
    html = render_page(
        package, "own.html", title="t", lead="l", command="show", styles=["own.css"], image=image
    )
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    assert '<section><h2>a &lt; b</h2><div class="card"><p>c</p></div></section>' in html
    assert f'<img class="curve" alt="a &#34;graph&#34;" src="{image}">' in html
    assert ".x{color:red}" in html
    assert has_mark(path, "show") and not has_mark(path, "report")
