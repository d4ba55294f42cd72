"""What cleaning found and did, in numbers: `cleaning.json` and the lines on the terminal."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from data_tools.coco import AnnotatedImage
from data_tools.digests import file_digest
from data_tools.instruct.clean import texts
from data_tools.instruct.clean.images import Looks
from data_tools.instruct.clean.table import NO_GROUP, TYPES, Table, family_values
from data_tools.instruct.config import CleanConfig
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Sample

_NAMED: Final = 20
"""Openings, duplicate images and one-sided groups that are listed by name, at most."""


class Figures:
    """Counts of samples and turns before and after, by whatever they were balanced by."""

    def __init__(
        self, config: CleanConfig, table: Table, known: Mapping[int, AnnotatedImage], looks: Looks
    ) -> None:
        self._config, self._table, self._known, self._looks = config, table, known, looks
        self._live = table.live_turns()
        self._counts: dict[str, Counter[str]] = {}
        self._openings = {digest: "" for found in self._common_openings() for digest in found}

    def count(self, before: Sample, after: Sample | None, lost: list[Sample]) -> None:
        """One sample as it was and as it is kept, and the lines of it that were set aside."""
        categories = self._known[before.image.id].categories or ("no box",)
        for name, sample in (("before", before), ("kept", after)):
            if sample is None:
                continue
            self._add(f"samples_{name}", [sample.type])
            self._add(f"origins_{name}", [sample.origin])
            self._add(f"categories_{name}", categories)
            self._add(f"kinds_{name}", [turn.kind for turn in sample.turns])
        whole = after is None
        self._add("lines_set_aside", ["whole samples" if whole else "single turns"] * len(lost))
        for sample in lost:
            reasons = [r for r in sample.reasons if r not in before.reasons]
            self._add("samples_by_reason" if whole else "turns_by_reason", reasons)
        if self._config.openings:
            for turn in before.turns:
                self._name_opening(turn.answer, self._config.openings.min_words)

    def _add(self, name: str, values: Any) -> None:
        self._counts.setdefault(name, Counter()).update(values)

    def _name_opening(self, answer: str, min_words: int) -> None:
        opening = texts.opening(answer, min_words)
        if opening and (digest := texts.digest(opening) | 1) in self._openings:
            self._openings[digest] = opening

    def as_dict(self, folder: RunFolder) -> dict[str, Any]:
        """All of it, for `cleaning.json`."""
        return {
            "settings": self._config.model_dump(mode="json", exclude={"same_images": {"workers"}}),
            "input": _file(folder.samples) | self._of_all(np.ones_like(self._live)),
            "kept": _file(folder.kept) | self._of_all(self._live),
            "set_aside": _file(folder.set_aside) | self._set_aside(),
            "types": self._pairs("samples"),
            "origins": self._pairs("origins"),
            "kinds": self._pairs("kinds"),
            "categories": self._pairs("categories"),
            "answers": self._answers(),
            "openings": self._opening_figures(),
            "images": self._images(),
            "not_reached": self.not_reached(),
            "bytes_a_sample": round(self._table.bytes() / max(1, len(self._table)), 1),
        }

    def summary(self) -> str:
        """For the terminal."""
        kept = sum(self._counts.get("samples_kept", Counter()).values())
        lines = [f"kept {kept:,} of {len(self._table):,} samples and {int(self._live.sum()):,} of "
                 f"{len(self._live):,} turns"]  # fmt: skip
        for what in ("samples", "turns"):
            for reason, number in sorted(self._counts.get(f"{what}_by_reason", {}).items()):
                lines.append(f"  {number:>9,} {what:<7} {reason}")
        lines += [f"not reached: {sentence}" for sentence in self.not_reached()]
        return "\n".join(lines)

    def not_reached(self) -> list[str]:
        """What balance was asked for and is not there, and why."""
        return [*self._tilted(), *self._monotonous(), *self._missing_types()]

    # --- whole

    def _of_all(self, turns: NDArray[np.bool_]) -> dict[str, int]:
        owners = self._table.owners[turns]
        return {"samples": len(np.unique(owners)), "turns": int(turns.sum())}

    def _set_aside(self) -> dict[str, Any]:
        lines = self._counts.get("lines_set_aside", Counter())
        return {
            "lines": sum(lines.values()),
            "samples": lines["whole samples"],
            "turns_of_kept_samples": lines["single turns"],
            "samples_by_reason": dict(sorted(self._counts.get("samples_by_reason", {}).items())),
            "turns_by_reason": dict(sorted(self._counts.get("turns_by_reason", {}).items())),
        }

    def _pairs(self, name: str) -> dict[str, dict[str, float]]:
        before = self._counts.get(f"{name}_before", Counter())
        kept = self._counts.get(f"{name}_kept", Counter())
        total = max(1, kept.total())
        return {
            key: {"before": before[key], "kept": kept[key], "share": round(kept[key] / total, 4)}
            for key in sorted(before)
        }

    # --- answers

    def _answers(self) -> dict[str, Any]:
        everything = np.ones_like(self._live)
        return {
            family: {
                "before": self._family(family, everything),
                "kept": self._family(family, self._live),
            }
            for family in sorted({name[0] for name in self._table.group_names})
        }

    def _family(self, family: str, turns: NDArray[np.bool_]) -> dict[str, Any]:
        counts = self._group_counts(family, turns)
        total = int(counts.sum())
        best = float(counts.max(axis=1).sum() / total) if total else 0.0
        told: dict[str, Any] = dict(
            zip(family_values(family), counts.sum(axis=0).tolist(), strict=True)
        )
        return told | {"guessed_by_category_alone": round(best, 4)}

    def _group_counts(self, family: str, turns: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Answers of the family's groups `[groups, values]`."""
        names, size = self._table.group_names, len(family_values(family))
        mine = np.array([name[0] == family for name in names])
        inside = turns & (self._table.groups != NO_GROUP)
        groups, values = self._table.groups[inside], self._table.values[inside].astype(np.int64)
        of_family = mine[groups]
        flat = groups[of_family].astype(np.int64) * size + values[of_family]
        counts = np.bincount(flat, minlength=len(names) * size).reshape(len(names), size)
        return counts[mine]

    def _tilted(self) -> list[str]:
        answers = self._config.answers
        found = []
        for family in sorted({name[0] for name in self._table.group_names}):
            counts = self._group_counts(family, self._live)
            allowed = np.floor(counts.min(axis=1) * answers.ratio) + answers.slack
            tilted = int((counts.max(axis=1) > allowed).sum())
            total = counts.sum(axis=0)
            if tilted:
                found.append(
                    f"{family}: {tilted} of {len(counts)} groups (kind and categories) are tilted, "
                    "since turns after the surplus ones refer back to them"
                )
            if total.max() > int(total.min() * answers.ratio) + answers.slack:
                told = ", ".join(
                    f"{n:,} {v}" for v, n in zip(family_values(family), total, strict=True)
                )
                found.append(f"{family}: over all {told}")
        return found

    # --- openings

    def _common_openings(self) -> list[dict[int, tuple[int, int]]]:
        """For each type its commonest openings with their counts before and after."""
        types = self._table.types[self._table.owners]
        found: list[dict[int, tuple[int, int]]] = []
        for number in range(len(TYPES)):
            of_type = (types == number) & (self._table.openings != 0)
            before = _counted(self._table.openings[of_type])
            kept = _counted(self._table.openings[of_type & self._live])
            common = sorted(before, key=lambda d: (-before[d], d))[:_NAMED]
            found.append({digest: (before[digest], kept.get(digest, 0)) for digest in common})
        return found

    def _opening_figures(self) -> dict[str, Any]:
        types = self._table.types[self._table.owners]
        told: dict[str, Any] = {}
        for number, common in enumerate(self._common_openings()):
            of_type = (types == number) & (self._table.openings != 0)
            kept = int((of_type & self._live).sum())
            told[TYPES[number]] = {
                "answers": {"before": int(of_type.sum()), "kept": kept},
                "commonest": [
                    {
                        "opening": self._openings[digest],
                        "before": before,
                        "kept": after,
                        "share": round(after / max(1, kept), 4),
                    }
                    for digest, (before, after) in common.items()
                ],
            }
        return told

    def _monotonous(self) -> list[str]:
        openings = self._config.openings
        if openings is None:
            return []
        found = []
        for name, figures in self._opening_figures().items():
            answers = figures["answers"]["kept"]
            allowed = max(openings.least, openings.max_share * answers)
            over = [o for o in figures["commonest"] if o["kept"] > allowed]
            if over:
                found.append(
                    f"openings of {name}: {over[0]['opening']!r} begins {over[0]['share']:.0%} of "
                    f"the answers, above {openings.max_share:.0%}, which cannot be reached without "
                    f"losing more than {openings.max_loss:.0%} of them (clean.openings)"
                )
        return found

    # --- types and images

    def _missing_types(self) -> list[str]:
        wanted = self._config.type_shares or {}
        kept = self._counts.get("samples_kept", Counter())
        return [
            f"type {name}: a share of {share:g} is wanted and there is no such sample"
            for name, share in wanted.items()
            if share > 0 and not kept[name]
        ]

    def _images(self) -> dict[str, Any]:
        repeats, unreadable = self._looks.repeats, self._looks.unreadable
        return {
            "used": len(np.unique(self._table.images)),
            "unreadable": len(unreadable),
            "look_like_an_earlier_one": len(repeats),
            "first_unreadable": dict(list(unreadable.items())[:_NAMED]),
            "first_alike": [list(pair) for pair in list(repeats.items())[:_NAMED]],
        }


def _counted(digests: NDArray[np.uint64]) -> dict[int, int]:
    values, counts = np.unique(digests, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _file(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": file_digest(path)}
