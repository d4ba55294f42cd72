"""The chat page: static files of this package, which talk to the API of the same server."""

from importlib.resources import files
from typing import Any, Final

from fastapi import FastAPI
from starlette.responses import Response

from vlm_sft.serving.protocol import Limits

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: nothing from elsewhere, and no script or style in the page itself."""

HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}
TYPES: Final = {
    "html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml",
}  # fmt: skip


def add_page(app: FastAPI, limits: Limits, *, needs_key: bool) -> None:
    """Add the routes of the page: `/` and `/page/...`.

    Args:
        app: The application.
        limits: Told to the page, so that it can refuse before uploading.
        needs_key: Whether the page has to ask for the API key.
    """
    folder = files("vlm_sft.serving") / "static"
    contents = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    settings = {
        "needs_key": needs_key,
        "max_body": limits.max_body,
        "max_tokens": limits.max_tokens,
        "max_images": limits.images.max_images,
    }

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(contents["index.html"], media_type=TYPES["html"], headers=HEADERS)

    @app.get("/page/settings.json", include_in_schema=False)
    async def page_settings() -> dict[str, Any]:
        return settings

    def add_file(name: str) -> None:
        @app.get(f"/page/{name}", include_in_schema=False)
        async def file() -> Response:
            kind = TYPES[name.rpartition(".")[2]]
            return Response(contents[name], media_type=kind, headers=HEADERS)

    for name in contents:
        if name != "index.html":
            add_file(name)
