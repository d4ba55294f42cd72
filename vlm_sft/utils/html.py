"""Render self-contained HTML pages from jinja2 templates, with every value escaped.

A page is one file: its styles, script and images are embedded, and a Content-Security-Policy allows
nothing else. Templates, CSS and JavaScript are files in the `templates` folder of a package.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vlm_sft.utils.escape import escape_control
from vlm_sft.utils.output_files import html_mark

_PACKAGE: Final = "vlm_sft.utils"
"""Has the templates that all pages share: `page.html`, `page.css` and `macros.html`."""


def render_page(
    package: str,
    template: str,
    *,
    title: str,
    lead: str,
    command: str,
    styles: Sequence[str] = (),
    script: str = "",
    **values: Any,
) -> str:
    """Return a page from a template that extends `page.html`.

    Args:
        package: Package whose `templates` folder has the files below.
        template: Template with the page's content (`{% block body %}`).
        title: Plain text, as is `lead`.
        lead: Sentence under the title.
        command: Command that writes the page, for the ownership mark in its head.
        styles: CSS files, in addition to `page.css`.
        script: JavaScript file; "" for a page without a script.
        values: Variables of the template. Strings are escaped, `Markup` is not.
    """
    environment = _environment(package)
    css = "".join(_source(environment, name) for name in styles)
    javascript = _source(environment, script) if script else ""
    head = _head(environment, title, lead, css, javascript, command)
    return environment.get_template(template).render(**head, **values)


def page(
    title: str,
    lead: str,
    body: Sequence[str],
    *,
    style: str = "",
    script: str = "",
    command: str = "page",
) -> str:
    """Return a page around finished HTML.

    Args:
        title: Plain text, as is `lead`.
        lead: Sentence under the title.
        body: Parts of the page's HTML; the caller has escaped all values in it.
        style: CSS, in addition to `page.css`.
        script: JavaScript source, without data in it.
        command: Command that writes the page, for the ownership mark in its head.
    """
    environment = _environment(_PACKAGE)
    head = _head(environment, title, lead, style, script, command)
    return environment.get_template("page.html").render(**head, body=Markup("".join(body)))


def section(title: str, content: str) -> str:
    """Return a titled card around finished HTML."""
    macros: Any = _environment(_PACKAGE).get_template("macros.html").module
    return str(macros.section(title, caller=lambda: Markup(content)))


def embedded_image(data: bytes, css: str, text: str, kind: str = "png") -> str:
    """Return an `<img>` with the image's bytes inside it.

    Args:
        data: The encoded image.
        css: Class of the element.
        text: Description of the image (`alt`).
        kind: `png` or `jpeg`.
    """
    macros: Any = _environment(_PACKAGE).get_template("macros.html").module
    return str(macros.figure(data_uri(data, kind), css, text))


def data_uri(data: bytes, kind: str = "png") -> Markup:
    """Return an encoded image as a `data:` URI, which needs no escaping."""
    return Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


@cache
def _environment(package: str) -> Environment:
    """Return the jinja2 environment of the templates of `package` and of all pages."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(_PACKAGE)]),
        autoescape=True,
        finalize=_escape_value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _escape_value(value: Any) -> Any:
    """Escape control characters of a string before jinja2 escapes its HTML characters."""
    return escape_control(value) if type(value) is str else value


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _head(
    environment: Environment, title: str, lead: str, style: str, script: str, command: str
) -> dict[str, Any]:
    """Return the variables of `page.html`."""
    # Only the script with this hash may run, so text from a record could not become a script even
    # if it were not escaped.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    script_policy = f"; script-src 'sha256-{digest}'" if script else ""
    return {
        "title": title,
        "lead": lead,
        "mark": Markup(html_mark(command)),
        "policy": Markup(
            f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{script_policy}"
        ),
        "style": Markup(_source(environment, "page.css") + style),
        "script": Markup(script),
    }
