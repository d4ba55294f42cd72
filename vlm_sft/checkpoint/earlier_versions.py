"""Compare a run with what earlier versions of this package recorded in their manifests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vlm_sft.checkpoint.digests import template_digest
from vlm_sft.utils.reading import read_json

TEMPLATE: Final = "template.json"

RENAMED_QUIRKS: Final = {
    "picture_first": "image_first",
    "space_behind_picture": "space_behind_image",
}
"""Names of LLaVA's quirks in manifests of earlier versions."""


def identity(name: str, value: Any, folder: Path | None = None) -> Any:
    """Return the part of a fingerprint's entry by which two runs are compared.

    The digest of the chat template is computed again from `template.json`, because earlier versions
    included the template's description in it, which may be reworded. Of LLaVA's quirks the names
    count, and not the sentences that explain them.

    Args:
        name: The entry's name in the manifest: `template`, `recipe` (LLaVA's quirks), ...
        value: Its value.
        folder: The verified checkpoint that recorded the value; None for the value of this run.

    Raises:
        UserError: `template.json` cannot be read.
    """
    if name == "template" and folder is not None and (folder / TEMPLATE).is_file():
        return template_digest(read_json(folder / TEMPLATE))
    if name == "recipe" and isinstance(value, Mapping):
        quirks = sorted(RENAMED_QUIRKS.get(quirk, quirk) for quirk in value.get("repeated", ()))
        return {"name": value.get("name"), "repeated": quirks}
    return value
