"""Names of the built-in chat templates."""

from importlib import resources


def builtin_templates() -> list[str]:
    """Return the names of the templates that are part of the package."""
    folder = resources.files("vlm_sft.data") / "templates"
    return sorted(e.name[:-5] for e in folder.iterdir() if e.name.endswith(".yaml"))
