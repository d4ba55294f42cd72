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
    package: str | tuple[str, ...],
    template: str,
    *,
    title: str,
    lead: str,
    command: str,
    styles: Sequence[str] = (),
    script: str = "",
    connects: bool = False,
    **values: Any,
) -> str:
    """Return a page from a template that extends `page.html`.

    Args:
        package: Package whose `templates` folder has the files below, or several.
        template: Template with the page's content (`{% block body %}`).
        title: Plain text, as is `lead`.
        lead: Sentence under the title.
        command: Command that writes the page, for the ownership mark in its head.
        styles: CSS files, in addition to `page.css`.
        script: JavaScript file; "" for a page without a script.
        connects: Whether the script may talk to the server that the page comes from.
        values: Variables of the template. Strings are escaped, `Markup` is not.
    """
    environment = _environment(*_packages(package))
    javascript = _source(environment, script) if script else ""
    # Only the script with this hash may run, so text from a record could not become a script even
    # if it were not escaped.
    digest = base64.b64encode(hashlib.sha256(javascript.encode()).digest()).decode()
    script_policy = f"; script-src 'sha256-{digest}'" if javascript else ""
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{script_policy}"
    policy += "; connect-src 'self'" if connects else ""
    return environment.get_template(template).render(
        title=title,
        lead=lead,
        mark=Markup(html_mark(command)),
        policy=Markup(policy),
        style=Markup("".join(_source(environment, name) for name in ("page.css", *styles))),
        script=Markup(javascript),
        **values,
    )


def render_fragment(package: str | tuple[str, ...], template: str, **values: Any) -> str:
    """Return a part of a page, escaped as `render_page` does it."""
    return _environment(*_packages(package)).get_template(template).render(**values)


def data_uri(data: bytes, kind: str = "png") -> Markup:
    """Return an encoded image as a `data:` URI, which needs no escaping."""
    return Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


def _packages(package: str | tuple[str, ...]) -> tuple[str, ...]:
    return (package,) if isinstance(package, str) else package


@cache
def _environment(*packages: str) -> Environment:
    """Return the jinja2 environment of the templates of packages and of all pages."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in (*packages, _PACKAGE)]),
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
