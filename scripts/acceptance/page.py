"""The report: a Markdown page made from the JSON file, and nothing else."""

from typing import Any

from acceptance.figures import FIGURES, PARTS, Figure


def make_page(results: dict[str, Any]) -> str:
    """Return the page: a table of target, figure and verdict for every part."""
    found: dict[str, dict[str, Any]] = results["figures"]
    lines = ["# Acceptance on a GPU", "", _opening(results), ""]
    for part in PARTS:
        state = results["parts"].get(part.name)
        lines += [f"## {part.title}", "", _state(state), ""]
        lines += ["| | target | figure | verdict | note |", "|---|---|---|---|---|"]
        for figure in FIGURES:
            if figure.part == part.name:
                lines.append(_row(figure, found.get(figure.key)))
        lines.append("")
    lines += ["## Machine", ""]
    lines += [f"- {name}: {_plain(value)}" for name, value in sorted(results["facts"].items())]
    if not results["facts"]:
        lines.append("Not measured.")
    return "\n".join([*lines, ""])


def verdict(figure: Figure, value: float | None) -> str:
    """Return `pass`, `MISSED`, `recorded` or `not measured`."""
    if value is None:
        return "not measured"
    passed = figure.passes(value)
    return "recorded" if passed is None else "pass" if passed else "MISSED"


def _opening(results: dict[str, Any]) -> str:
    command = f"`{results['command']}`"
    if not results["figures"]:
        return (
            f"Nothing has been measured on a GPU yet: {command} was not run where one is. The "
            "tables show what it measures, and the targets."
        )
    text = f"Measured with {command} on {results['date']}, in {results['seconds']:.0f} seconds."
    if results["tiny"]:
        text += " **Tiny shapes: this shows that the code runs, and no figure means anything.**"
    return text


def _state(state: dict[str, Any] | None) -> str:
    if state is None:
        return "Not run."
    if not state["seconds"]:
        return f"{state['state'].capitalize()}."
    return f"{state['state'].capitalize()} after {state['seconds']:.0f} s."


def _row(figure: Figure, found: dict[str, Any] | None) -> str:
    target = ""
    if figure.compare is not None and figure.target is not None:
        bound = f"{figure.target:g} {figure.unit}".strip()
        target = "yes" if figure.compare == "==" else f"{figure.compare} {bound}"
    value = None if found is None else found["value"]
    shown = "-" if value is None else _number(figure, value)
    note = "" if found is None else _plain(found["note"])
    return f"| {figure.title} | {target} | {shown} | {verdict(figure, value)} | {note} |"


def _number(figure: Figure, value: float) -> str:
    if figure.compare == "==":
        return "yes" if value == 1 else "NO"
    text = f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:,.4g}"
    return f"{text} {figure.unit}".strip()


def _plain(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
