"""Describe a mixture: a table for the terminal, JSON and Markdown for who trains on it."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from data_tools.digests import file_digest
from data_tools.mix.config import MixConfig
from data_tools.mix.quotas import RecordCounts
from data_tools.mix.read import Source


def mixture_card(
    config: MixConfig,
    sources: Sequence[Source],
    wanted: Mapping[str, RecordCounts],
    times: Sequence[NDArray[np.uint32]],
    image_root: Path,
    output: Path,
) -> dict[str, Any]:
    """Return the contents of `card.json`.

    Args:
        config: The configuration.
        sources: The sources.
        wanted: The wanted records of each source.
        times: How often each record was taken, for each source.
        image_root: The directory that the mixture's image names start from.
        output: The training file.
    """
    num_wanted = sum(counts.total for counts in wanted.values())
    num_taken = sum(int(taken.sum()) for taken in times)
    split = config.cannot_tell_share is not None
    rows: list[dict[str, Any]] = []
    models = Counter[str]()
    for source, taken in zip(sources, times, strict=True):
        settings = source.config
        models.update(source.models(taken))
        rows.append(
            {
                "name": settings.name,
                "records": len(source.records),
                "available": source.available(split=split).total,
                "taken": int(taken.sum()),
                "cannot_tell": int(taken[source.records["cannot_tell"].to_numpy()].sum()),
                "repeated": int(np.maximum(taken.astype(np.int64) - 1, 0).sum()),
                "wanted_share": _share(wanted[settings.name].total, num_wanted),
                "reached_share": _share(int(taken.sum()), num_taken),
                "path": settings.path,
                "sha256": _path_digest(Path(settings.path)),
                "license": settings.license,
                "terms": settings.terms,
                "replay": settings.replay,
                "left_out": source.left_out(),
                "bad_records": dict(sorted(source.bad.items())),
                "first_left_out": source.examples,
                "teacher_models": source.models(taken),
            }
        )
    replayed = sum(row["taken"] for row in rows if row["replay"])
    unsure = sum(row["cannot_tell"] for row in rows)
    return {
        "records": num_taken,
        "file": {"name": output.name, "sha256": file_digest(output)},
        "image_root": str(image_root),
        "seed": config.seed,
        "shares": {
            "replay": {"wanted": config.replay_share, "reached": _share(replayed, num_taken)},
            "cannot_tell": {
                "wanted": config.cannot_tell_share,
                "reached": _share(unsure, num_taken),
            },
        },
        "teacher_models": dict(sorted(models.items())),
        "evaluation_guard": {
            "lists": config.guard.lists,
            "allow_evaluation_images": config.guard.allow_evaluation_images,
            "images_inside_files_not_checked": sum(source.num_embedded for source in sources),
        },
        "sources": rows,
        "settings": config.model_dump(mode="json"),
    }


def table(card: Mapping[str, Any]) -> str:
    """Return the sources as a table for the terminal."""
    counts = ["records", "available", "taken", "repeated"]
    frame = pd.DataFrame(card["sources"])
    shown = pd.DataFrame({"source": frame["name"]})
    shown[counts] = frame[counts]
    for column in ("wanted", "reached"):
        shown[column] = frame[f"{column}_share"].map("{:.1%}".format)
    shown.loc[len(shown)] = ["all", *frame[counts].sum(), "", ""]
    shown[counts] = shown[counts].map("{:,}".format)
    return str(shown.to_string(index=False))


def markdown(card: Mapping[str, Any]) -> str:
    """Return the card as Markdown."""
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=False,  # the values are not HTML but the user's configuration
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md").render(card=card)


def _path_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a directory's files with their names."""
    if not path.is_dir():
        return file_digest(path)
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(f"{file.relative_to(path).as_posix()} {file_digest(file)}\n".encode())
    return whole.hexdigest()


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0
