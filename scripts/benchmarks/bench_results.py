"""Write the results of a benchmark: a table on the terminal, a Markdown page and a JSON file."""

import argparse
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vlm_sft.utils.atomic_files import write_json, write_text

PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "peft", "pillow", "numpy")
FOLDER = Path("docs/benchmarks")

Row = Mapping[str, Any]


def machine_facts() -> dict[str, Any]:
    """Return processor, memory, accelerator, system, versions and the date (UTC)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | _versions(),
    }


def command_line(script: str, given: Sequence[str]) -> str:
    """Return the command without options that name folders of this machine."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--environments", "--output", "--scratch"):
        parser.add_argument(option)
    return shlex.join([script, *parser.parse_known_args(list(given))[1]])


def print_table(title: str, columns: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Print the rows; `columns` maps a row's key to its heading."""
    table = Table(title=title)
    for place, heading in enumerate(columns.values()):
        table.add_column(heading, justify="right" if place else "left", no_wrap=place == 0)
    for row in rows:
        table.add_row(*(_shown(row.get(key)) for key in columns))
    Console(file=sys.stdout, width=150).print(table)


def markdown_table(columns: Mapping[str, str], rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table; see `print_table`."""
    lines = [" | ".join(columns.values()), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_shown(row.get(key)) for key in columns) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def write_results(
    folder: Path,
    name: str,
    *,
    title: str,
    command: str,
    tables: Sequence[tuple[str, Mapping[str, str], Sequence[Row]]],
    details: Mapping[str, Any],
    facts: Mapping[str, Any],
    plot: str | None = None,
) -> None:
    """Write `NAME.json` and `NAME.md` into `folder`.

    Args:
        folder: Created if it does not exist.
        name: Name of the files, without extension.
        title: Heading of the page.
        command: The command that repeats the benchmark.
        tables: Heading, columns (key to heading) and rows of each.
        details: Further measurements, written to the JSON file only.
        facts: `machine_facts()` from before the benchmark.
        plot: File name of a plot in the same folder, if any.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {heading: list(found) for heading, _, found in tables}
    write_json(
        folder / f"{name}.json",
        {"title": title, "command": command, "machine": facts, "tables": rows, **details},
    )
    versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    accelerator = f", {facts['accelerator']}" if facts["accelerator"] else ", no accelerator"
    parts = [
        f"# {title}\n",
        f"Made by `{command}` on {facts['date']}: {facts['processor']}, {facts['cores']} cores, "
        f"{facts['memory_gib']} GiB{accelerator}; {versions}.\n",
    ]
    for heading, columns, found in tables:
        parts.append(f"## {heading}\n\n{markdown_table(columns, found)}")
    if plot is not None:
        parts.append(f"![{title}]({plot})\n")
    write_text(folder / f"{name}.md", "\n".join(parts))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
