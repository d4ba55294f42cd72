"""The contents of a mixture: a table for the terminal, and a card as JSON and Markdown."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.digests import file_digest
from data_tools.mix.config import MixConfig
from data_tools.mix.quotas import Available, Quota
from data_tools.mix.scan import Source


@dataclass(frozen=True)
class Row:
    """One source in the table; shares are of the mixture."""

    name: str
    records: int
    available: int
    taken: int
    cannot_tell: int
    repeated: int
    wanted_share: float
    reached_share: float


def rows(
    sources: Sequence[Source],
    quotas: Mapping[str, Quota],
    available: Mapping[str, Available],
    times: Sequence[NDArray[np.uint32]],
) -> list[Row]:
    """Return the table of a mixture."""
    wanted = {name: quota.plain + quota.cannot_tell for name, quota in quotas.items()}
    all_wanted, all_taken = sum(wanted.values()), sum(int(t.sum()) for t in times)
    return [
        Row(
            name=source.config.name,
            records=len(source.states),
            available=sum(vars(available[source.config.name]).values()),
            taken=int(taken.sum()),
            cannot_tell=int(taken[source.unsure].sum()),
            repeated=int(np.maximum(taken.astype(np.int64) - 1, 0).sum()),
            wanted_share=wanted[source.config.name] / max(1, all_wanted),
            reached_share=int(taken.sum()) / max(1, all_taken),
        )
        for source, taken in zip(sources, times, strict=True)
    ]


def table(found: Sequence[Row]) -> str:
    """Return the rows as text."""
    names = ("source", "records", "available", "taken", "repeated", "wanted", "reached")
    lines = [list(names)]
    for row in found:
        counts = [row.records, row.available, row.taken, row.repeated]
        shares = [row.wanted_share, row.reached_share]
        lines.append([row.name, *(f"{n:,}" for n in counts), *(f"{s:.1%}" for s in shares)])
    total = [sum(values) for values in zip(*[_counts(row) for row in found], strict=True)]
    lines.append(["all", *(f"{number:,}" for number in total), "", ""])
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(w.rjust(n) for w, n in zip(line[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for line in lines
    )


def _counts(row: Row) -> tuple[int, int, int, int]:
    return row.records, row.available, row.taken, row.repeated


def card(
    config: MixConfig,
    sources: Sequence[Source],
    times: Sequence[NDArray[np.uint32]],
    found: Sequence[Row],
    root: Path,
    output: Path,
) -> dict[str, Any]:
    """Return the content of `card.json`."""
    total = sum(row.taken for row in found)
    unsure = sum(row.cannot_tell for row in found)
    replayed = sum(
        row.taken for row, source in zip(found, sources, strict=True) if source.config.replay
    )
    teachers: Counter[str] = Counter()
    for source, taken in zip(sources, times, strict=True):
        teachers.update(source.teachers(taken))
    return {
        "records": total,
        "file": {"name": output.name, "sha256": file_digest(output)},
        "image_root": str(root),
        "seed": config.seed,
        "shares": {
            "replay": {"wanted": config.replay_share, "reached": _share(replayed, total)},
            "cannot_tell": {"wanted": config.cannot_tell_share, "reached": _share(unsure, total)},
        },
        "teacher_models": dict(sorted(teachers.items())),
        "evaluation_guard": {
            "lists": config.guard.lists,
            "allow_evaluation_images": config.guard.allow_evaluation_images,
            "images_inside_files_not_checked": sum(source.embedded for source in sources),
        },
        "sources": [
            _of_source(source, row, taken)
            for source, row, taken in zip(sources, found, times, strict=True)
        ],
        "settings": config.model_dump(mode="json"),
    }


def _of_source(source: Source, row: Row, taken: NDArray[np.uint32]) -> dict[str, Any]:
    given = source.config
    return {
        **vars(row),
        "wanted_share": round(row.wanted_share, 6),
        "reached_share": round(row.reached_share, 6),
        "path": given.path,
        "sha256": _digest(Path(given.path)),
        "license": given.license,
        "terms": given.terms,
        "replay": given.replay,
        "left_out": source.left_out(),
        "bad_records": dict(sorted(source.bad.items())),
        "first_left_out": source.examples,
        "teacher_models": source.teachers(taken),
    }


def markdown(content: Mapping[str, Any]) -> str:
    """Return the card as Markdown, from the same values."""
    lines = [
        "# Mixture card",
        "",
        f"{content['records']:,} records in `{content['file']['name']}` "
        f"(sha256 `{content['file']['sha256']}`), seed {content['seed']}. Record ids are "
        "`source/id`.",
        "",
        "| source | records | available | taken | repeated | share wanted | reached | license |"
        " terms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for source in content["sources"]:
        lines.append(
            f"| {source['name']} | {source['records']:,} | {source['available']:,} "
            f"| {source['taken']:,} | {source['repeated']:,} | {source['wanted_share']:.1%} "
            f"| {source['reached_share']:.1%} | {source['license']} | {source['terms']} |"
        )
    lines += ["", "## Shares", ""]
    for name, share in content["shares"].items():
        wanted = "not set" if share["wanted"] is None else f"{share['wanted']:.1%} wanted"
        lines.append(f"- {name.replace('_', ' ')}: {share['reached']:.1%} ({wanted})")
    lines += ["", "## Left out", ""]
    for source in content["sources"]:
        for what, number in source["left_out"].items():
            first = source["first_left_out"].get(what)
            lines.append(
                f"- {source['name']}: {number:,} x {what}" + (f"; first: {first}" if first else "")
            )
    if lines[-1] == "":
        lines.append("Nothing.")
    lines += ["", "## Teachers", ""]
    for model, number in content["teacher_models"].items():
        lines.append(f"- {model or 'unknown (no receipt)'}: {number:,} records")
    lines += ["", "## Digests", ""]
    lines += [
        f"- {source['name']}: `{source['path']}` {source['sha256']}"
        for source in content["sources"]
    ]
    return "\n".join(lines) + "\n"


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's files with their names."""
    if not path.is_dir():
        return file_digest(path)
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(f"{file.relative_to(path).as_posix()} {file_digest(file)}\n".encode())
    return whole.hexdigest()


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0
