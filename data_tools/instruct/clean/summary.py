"""Summarize what cleaning found and did: `cleaning.json` and the lines on the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from data_tools.coco import AnnotatedImage
from data_tools.digests import file_digest
from data_tools.instruct.clean import texts
from data_tools.instruct.clean.codes import KEPT
from data_tools.instruct.clean.same_images import SameImages
from data_tools.instruct.clean.table import SampleFile, Table, family_values, opening_digest
from data_tools.instruct.config import CleanConfig
from data_tools.instruct.run_folder import RunFolder

_MAX_LISTED: Final = 20
"""Openings and images that are listed by name."""


def summarize(
    config: CleanConfig,
    table: Table,
    known: Mapping[int, AnnotatedImage],
    same: SameImages,
    folder: RunFolder,
    file: SampleFile,
    path: Path,
) -> dict[str, Any]:
    """Return the contents of `cleaning.json`.

    Args:
        config: The settings.
        table: After all decisions.
        known: The index of images.
        same: The images that look the same.
        folder: The run directory, with its output files.
        file: The samples, for the texts of openings.
        path: The file that they were read from.
    """
    samples, turns = table.samples, table.turns
    kept_samples, kept_turns = samples[table.live_samples], turns[table.live]
    pairs = {
        "types": (samples["type"], kept_samples["type"]),
        "origins": (samples["origin"], kept_samples["origin"]),
        "kinds": (turns["kind"], kept_turns["kind"]),
        "categories": (_categories(samples, known), _categories(kept_samples, known)),
    }
    summary: dict[str, Any] = {
        "settings": config.model_dump(mode="json", exclude={"same_images": {"workers"}}),
        "input": _file(path) | {"samples": len(samples), "turns": len(turns)},
        "kept": _file(folder.kept) | {"samples": len(kept_samples), "turns": len(kept_turns)},
        "dropped": _file(folder.dropped) | _dropped(table),
        **{name: _shares(*columns) for name, columns in pairs.items()},
        "answers": {
            family: {
                "before": _answers(table, family, turns),
                "kept": _answers(table, family, kept_turns),
            }
            for family in sorted(table.groups["family"].unique())
        },
        "openings": _openings(config, table, file),
        "images": {
            "used": samples["image"].nunique(),
            "unreadable": len(same.unreadable),
            "look_like_an_earlier_one": len(same.repeats),
            "first_unreadable": dict(list(same.unreadable.items())[:_MAX_LISTED]),
            "first_alike": [list(pair) for pair in list(same.repeats.items())[:_MAX_LISTED]],
        },
        "bytes_per_sample": round(table.num_bytes() / max(1, len(samples)), 1),
    }
    summary["not_reached"] = [
        *_unbalanced_answers(config, table, kept_turns),
        *_frequent_openings(config, summary["openings"]),
        *(
            f"type {name}: a share of {share:g} is wanted, but there are no such samples"
            for name, share in (config.type_shares or {}).items()
            if share > 0 and not (kept_samples["type"] == name).any()
        ),
    ]
    return summary


def summary_lines(summary: Mapping[str, Any]) -> str:
    """Return the lines for the terminal."""
    before, kept, dropped = (summary[name] for name in ("input", "kept", "dropped"))
    lines = [
        f"kept {kept['samples']:,} of {before['samples']:,} samples and {kept['turns']:,} of "
        f"{before['turns']:,} turns"
    ]
    for what in ("samples", "turns"):
        for reason, number in dropped[f"{what}_by_reason"].items():
            lines.append(f"  {number:>9,} {what:<7} {reason}")
    lines += [f"not reached: {sentence}" for sentence in summary["not_reached"]]
    return "\n".join(lines)


def _categories(samples: pd.DataFrame, known: Mapping[int, AnnotatedImage]) -> pd.Series:
    """Return the categories of the samples' images, one row each."""
    names = {image: known[image].categories or ("no box",) for image in samples["image"].unique()}
    return samples["image"].map(names).explode()


def _counts(values: pd.Series) -> dict[str, int]:
    """Return the number of each value, in alphabetical order."""
    counts = values.value_counts()
    return {str(name): int(counts[name]) for name in sorted(counts.index) if counts[name]}


def _shares(before: pd.Series, kept: pd.Series) -> dict[str, dict[str, float]]:
    after, total = _counts(kept), max(1, len(kept))
    return {
        name: {
            "before": number,
            "kept": after.get(name, 0),
            "share": round(after.get(name, 0) / total, 4),
        }
        for name, number in _counts(before).items()
    }


def _dropped(table: Table) -> dict[str, Any]:
    """Count the lines of `dropped.jsonl`; a sample is one line, for one or more reasons."""
    live, samples = table.live_samples, table.samples
    turns = table.turns[table.turns["code"] != KEPT]
    numbers = turns["sample"].to_numpy()
    of_kept = turns[live[numbers]]
    whole = samples["code"][samples["code"] != KEPT]
    # Samples that lost their turns one by one; each reason counts once per sample.
    emptied = turns[~live[numbers] & (samples["code"].array[numbers] == KEPT)]
    emptied = emptied.drop_duplicates(["sample", "code"])
    num_samples = int((~live).sum())
    return {
        "lines": num_samples + len(of_kept),
        "samples": num_samples,
        "turns_of_kept_samples": len(of_kept),
        "samples_by_reason": _counts(pd.concat([whole, emptied["code"]])),
        "turns_by_reason": _counts(of_kept["code"]),
    }


def _answer_counts(table: Table, family: str, turns: pd.DataFrame) -> pd.DataFrame:
    """Return the number of each answer in the groups of a family."""
    groups = table.groups.index[table.groups["family"] == family]
    counts = pd.crosstab(turns["group"], turns["value"])
    values = range(len(family_values(family)))
    return counts.reindex(index=groups, columns=values, fill_value=0)


def _answers(table: Table, family: str, turns: pd.DataFrame) -> dict[str, Any]:
    """Count the answers, and how often knowing the group alone would be enough to guess."""
    counts = _answer_counts(table, family, turns)
    total = int(counts.to_numpy().sum())
    guessed = float(counts.max(axis=1).sum() / total) if total else 0.0
    by_answer = dict(zip(family_values(family), counts.sum().tolist(), strict=True))
    return by_answer | {"guessed_by_category_alone": round(guessed, 4)}


def _unbalanced_answers(config: CleanConfig, table: Table, kept: pd.DataFrame) -> list[str]:
    ratio, slack = config.answers.ratio, config.answers.slack
    found = []
    for family in sorted(table.groups["family"].unique()):
        counts = _answer_counts(table, family, kept)
        allowed = np.floor(counts.min(axis=1) * ratio) + slack
        if unbalanced := int((counts.max(axis=1) > allowed).sum()):
            found.append(
                f"{family}: {unbalanced} of {len(counts)} groups (kind and categories) are "
                "unbalanced, because turns after the surplus ones refer back to them"
            )
        total = counts.sum()
        if total.max() > int(total.min() * ratio) + slack:
            numbers = zip(total, family_values(family), strict=True)
            listed = ", ".join(f"{number:,} {value}" for number, value in numbers)
            found.append(f"{family}: {listed} in total")
    return found


def _openings(config: CleanConfig, table: Table, file: SampleFile) -> dict[str, Any]:
    """Return the most frequent openings of each type."""
    if config.openings is None:
        return {}
    turns = table.turns[["sample", "opening"]].assign(
        type=table.samples["type"].array[table.turns["sample"].to_numpy()], kept=table.live
    )
    found: dict[str, Any] = {}
    for name, of_type in turns[turns["opening"] != 0].groupby("type", observed=False):
        openings = of_type.groupby("opening").agg(
            before=("kept", "size"), kept=("kept", "sum"), sample=("sample", "first")
        )
        openings = openings.sort_index().sort_values("before", ascending=False, kind="stable")
        total = int(of_type["kept"].sum())
        found[name] = {
            "answers": {"before": len(of_type), "kept": total},
            "most_frequent": [
                {
                    "opening": _opening(file, sample, digest, config.openings.min_words),
                    "before": before,
                    "kept": kept,
                    "share": round(kept / max(1, total), 4),
                }
                for digest, before, kept, sample in openings.head(_MAX_LISTED).itertuples()
            ],
        }
    return found


def _opening(file: SampleFile, sample: int, digest: int, min_words: int) -> str:
    """Return the text of an opening, from a sample that has it."""
    found = (texts.opening(turn.answer, min_words) for turn in file.read(sample).turns)
    return next(text for text in found if text and opening_digest(text) == digest)


def _frequent_openings(config: CleanConfig, openings: Mapping[str, Any]) -> list[str]:
    limits, found = config.openings, []
    for name, counts in openings.items():
        assert limits is not None
        allowed = max(limits.least, limits.max_share * counts["answers"]["kept"])
        above = [opening for opening in counts["most_frequent"] if opening["kept"] > allowed]
        if above:
            found.append(
                f"openings of {name}: {above[0]['opening']!r} begins {above[0]['share']:.0%} of "
                f"the answers, above {limits.max_share:.0%}, which cannot be reached without "
                f"dropping more than {limits.max_loss:.0%} of them (clean.openings)"
            )
    return found


def _file(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": file_digest(path)}
