"""Decide which records are selected, and why each of the others is not."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_tools.select.config import SelectConfig
from data_tools.select.diversity import cluster_firsts, farthest_first

SELECTED = ""


@dataclass(frozen=True)
class Table:
    """All records, one row each.

    Attributes:
        ids: The records' ids.
        categories: Their categories.
        problems: Why a record cannot be used; "" if it can.
        columns: Numbers by metric, NaN where there is none.
        embeddings: `[records, D]` of length 1; None if none are needed.
        truncated: Usable records whose text was cut for `clip`; None without `clip_model`.
    """

    ids: list[str]
    categories: list[str]
    problems: list[str]
    columns: dict[str, NDArray[np.float64]]
    embeddings: NDArray[np.float32] | None
    truncated: int | None = None


@dataclass(frozen=True)
class Decision:
    """Which records are selected, and why the others are not.

    Attributes:
        reasons: Why each record is not selected; "" if it is.
        selected: Rows of the selected records, in the order of the file.
        random: Rows of as many records, taken at random from the usable ones that have a number in
            every column that is read; limits and similarity do not matter, which are what the
            selection is compared with.
    """

    reasons: list[str]
    selected: NDArray[np.int64]
    random: NDArray[np.int64]


def decide(table: Table, config: SelectConfig) -> Decision:
    """Select records; see the settings of `SelectConfig`."""
    reasons = list(table.problems)
    usable = np.array([row for row, reason in enumerate(reasons) if not reason], dtype=np.int64)
    size = min(config.size or max(1, round(config.share * len(usable))), len(usable))
    candidates = _within_limits(table, config, usable, reasons)
    order = _ranked(table, config, candidates)
    if config.merge_similar is not None and table.embeddings is not None:
        order = _unlike(table, order, config.merge_similar, reasons)
    quotas = _quotas([table.categories[row] for row in usable], order, table, size, config.quotas)
    chosen: list[int] = []
    for category, quota in quotas.items():
        rows = np.array([row for row in order if table.categories[row] == category], np.int64)
        chosen += _diverse(table, config, rows, quota)
    taken = set(chosen)
    for row in order:
        if row not in taken:
            reasons[row] = "rank"
    read = [table.columns[name][usable] for name in {config.rank_by, *config.keep, *config.middle}]
    scored = usable[np.isfinite(read).all(axis=0)]
    rng = np.random.default_rng(config.seed)
    random = np.sort(rng.choice(scored, len(chosen), replace=False))
    return Decision(reasons, np.sort(np.array(chosen, dtype=np.int64)), random)


def _within_limits(
    table: Table, config: SelectConfig, usable: NDArray[np.int64], reasons: list[str]
) -> NDArray[np.int64]:
    """Return the rows with values inside of all limits; give the others a reason."""
    limits = {name: (low, high) for name, (low, high) in config.keep.items()}
    left = usable
    for name, (low, high) in limits.items():
        left = _cut(table.columns[name], left, low, high, name, reasons)
    for name, share in config.middle.items():
        values = table.columns[name][left]
        known = values[np.isfinite(values)]
        low, high = np.quantile(known, [0.5 - share / 2, 0.5 + share / 2]) if len(known) else (0, 0)
        left = _cut(table.columns[name], left, float(low), float(high), name, reasons)
    return _cut(table.columns[config.rank_by], left, None, None, config.rank_by, reasons)


def _cut(
    values: NDArray[np.float64],
    rows: NDArray[np.int64],
    low: float | None,
    high: float | None,
    name: str,
    reasons: list[str],
) -> NDArray[np.int64]:
    found = values[rows]
    unknown, infinite = np.isnan(found), np.isinf(found)
    known = np.isfinite(found)
    below = known & (found < low) if low is not None else np.zeros(len(rows), bool)
    above = known & (found > high) if high is not None else np.zeros(len(rows), bool)
    for mask, what in (
        (unknown, "unknown"), (infinite, "infinite"), (below, "too low"), (above, "too high"),
    ):  # fmt: skip
        for row in rows[mask]:
            reasons[row] = f"{name} {what}"
    return rows[known & ~below & ~above]


def _ranked(table: Table, config: SelectConfig, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return rows by rank, equal ones in the order of the file."""
    values = table.columns[config.rank_by][rows]
    return rows[np.argsort(-values if config.order == "highest" else values, kind="stable")]


def _unlike(
    table: Table, order: NDArray[np.int64], most: float, reasons: list[str]
) -> NDArray[np.int64]:
    """Return the rows that are like none before them; name the one that another is like."""
    assert table.embeddings is not None
    kept: list[int] = []
    matrix = np.zeros((len(order), table.embeddings.shape[1]), np.float32)
    for row in order:
        embedding = table.embeddings[row]
        cosines = matrix[: len(kept)] @ embedding
        if len(kept) and cosines.max() > most:
            reasons[row] = f"similar to {table.ids[kept[int(cosines.argmax())]]}"
            continue
        matrix[len(kept)] = embedding
        kept.append(int(row))
    return np.array(kept, dtype=np.int64)


def _quotas(
    usable: list[str], order: NDArray[np.int64], table: Table, size: int, how: str
) -> dict[str, int]:
    """Return how many records each category gives; what one lacks, the others give."""
    available = Counter(table.categories[row] for row in order)
    size = min(size, len(order))
    if how == "none":
        return dict(Counter(table.categories[row] for row in order[:size]))
    weights = Counter(usable) if how == "proportional" else Counter(dict.fromkeys(usable, 1))
    quotas: Counter[str] = Counter()
    for _ in range(size):
        # The category furthest below its share gives the next record (Sainte-Laguë's rule).
        open_ones = [name for name in weights if quotas[name] < available[name]]
        quotas[min(open_ones, key=lambda name: ((quotas[name] + 0.5) / weights[name], name))] += 1
    return dict(quotas)


def _diverse(table: Table, config: SelectConfig, rows: NDArray[np.int64], quota: int) -> list[int]:
    if config.diversity == "none" or table.embeddings is None or quota >= len(rows):
        return [int(row) for row in rows[:quota]]
    if config.diversity == "clusters":
        places = cluster_firsts(table.embeddings[rows], quota, seed=config.seed)
    else:
        pool = rows[: max(quota, min(len(rows), 4 * quota))]
        places = farthest_first(table.embeddings[pool], quota)
    return [int(rows[place]) for place in places]
