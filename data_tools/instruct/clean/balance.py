"""Drop repeated questions, and what makes an answer, opening, type or category too frequent."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.instruct.clean.table import NO_GROUP, Table, family_values
from data_tools.instruct.config import AnswerBalanceConfig, CleanConfig, OpeningsConfig
from data_tools.instruct.schema import SampleType

MAX_ROUNDS: Final = 20
"""Balancing one thing can unbalance another, so all is repeated until nothing changes."""


def drop_repeated_questions(table: Table) -> None:
    """Drop questions that an earlier turn asks about the same image.

    Later turns of the conversation that refer back to such a question are dropped as well.
    """
    turns = table.turns
    live = turns[table.live]
    repeated = live.duplicated("question")
    causes = live.groupby("question")["sample"].transform("first")[repeated]
    sample, refers_back = turns["sample"].to_numpy(), turns["refers_back"].to_numpy()
    dropped = {int(turn): int(cause) for turn, cause in causes.items()}
    for turn in list(dropped):
        follower = turn + 1
        while follower < len(turns) and sample[follower] == sample[turn] and refers_back[follower]:
            dropped.setdefault(follower, dropped[turn])
            follower += 1
    turns.loc[list(dropped), "code"] = "SAME_QUESTION"
    turns.loc[list(dropped), "cause"] = np.array(list(dropped.values()), np.int32)


def balance(table: Table, config: CleanConfig, categories: Mapping[int, Sequence[str]]) -> None:
    """Drop what exceeds the caps, shares and balances of the configuration.

    Args:
        table: Changed in place.
        config: The limits.
        categories: Annotated categories of each image.
    """
    for _ in range(MAX_ROUNDS):
        before = int(table.live.sum())
        _cap_images(table, config.max_per_image)
        _cap_categories(table, config.max_per_category, categories)
        _cap_types(table, config.type_shares)
        if config.openings is not None:
            _cap_openings(table, config.openings)
        _level_answers(table, config.answers)
        if int(table.live.sum()) == before:
            return


def _cap_images(table: Table, limit: int | None) -> None:
    if limit is not None:
        samples = table.samples[table.live_samples]
        table.samples.loc[above_limit(samples, "image", limit), "code"] = "IMAGE_CAP"


def _cap_categories(table: Table, cap: int | None, categories: Mapping[int, Sequence[str]]) -> None:
    """Keep the first `cap` samples of each category, and samples without a category.

    A rare category keeps all its samples, a frequent one at most `cap` more than the others keep of
    it (LLaVA's selection of captions by noun phrases).
    """
    samples = table.samples[table.live_samples]
    if cap is None or samples.empty:
        return
    pairs = samples.assign(category=samples["image"].map(categories)).explode("category")
    rank = pairs.groupby("category", dropna=False)["order"].rank(method="first")
    kept = pairs.index[(rank <= cap) | pairs["category"].isna()]
    table.samples.loc[samples.index.difference(kept), "code"] = "CATEGORY_CAP"


def _cap_types(table: Table, shares: Mapping[SampleType, float] | None) -> None:
    samples = table.samples[table.live_samples]
    counts = samples["type"].value_counts()
    # The summary says that the share of a type without samples was not reached.
    wanted = pd.Series({n: float(s) for n, s in (shares or {}).items() if s > 0 and counts[n]})
    if wanted.empty:
        return
    total = (counts[wanted.index] * wanted.sum() / wanted).min()
    limits = np.floor(wanted / wanted.sum() * total + 1e-9).reindex(counts.index, fill_value=0)
    limits = limits.clip(upper=counts)
    table.samples.loc[above_limit(samples, "type", limits), "code"] = "TYPE_SHARE"


def _cap_openings(table: Table, config: OpeningsConfig) -> None:
    turns = table.live_turns()
    for _, of_type in turns[turns["opening"] != 0].groupby("type", observed=True):
        counts = of_type["opening"].value_counts().to_numpy()
        limit = share_limit(counts, config.max_share, least=config.least, max_loss=config.max_loss)
        table.turns.loc[above_limit(of_type, "opening", limit), "code"] = "OPENING_CAP"


def _level_answers(table: Table, config: AnswerBalanceConfig) -> None:
    """Level each group of categories within a kind, then each kind, then the whole family."""
    for family in sorted(table.groups["family"].unique()):
        for coarse in ("group", "group_kind", "family"):
            turns = table.live_turns()
            turns = turns[turns["group"] != NO_GROUP]
            groups = table.groups.loc[turns["group"]]
            turns["family"], turns["group_kind"] = groups["family"].array, groups["kind"].array
            dropped = level(
                turns[turns["family"] == family],
                coarse,
                len(family_values(family)),
                ratio=config.ratio,
                slack=config.slack,
            )
            table.turns.loc[dropped, "code"] = "ANSWER_BALANCE"


def level(
    turns: pd.DataFrame, coarse: str, num_values: int, *, ratio: float, slack: int
) -> pd.Index:
    """Return the turns to drop so that no answer is too frequent in a coarse group.

    An answer may have `ratio` times as many turns as the rarest one, plus `slack`. Turns are
    dropped in random order, and only where the answer is too frequent in its `group` as well, so
    that levelling the whole does not unbalance its parts.

    Args:
        turns: Columns `group`, `value`, `order`, `free` and the one that is named by `coarse`.
        coarse: Column of the groups to level.
        num_values: Number of possible answers.
        ratio: At least 1.
        slack: Number of turns.
    """
    candidates = turns[turns["free"].astype(bool)]
    for by, allowed, more in (("group", 1.0, 0), (coarse, ratio, slack)):
        counts = turns.groupby([by, "value"]).size().unstack(fill_value=0)
        counts = counts.reindex(columns=range(num_values), fill_value=0)
        limits = np.floor(counts.min(axis=1) * allowed) + more
        surplus = counts.sub(limits, axis=0).stack().rename("surplus")
        rank = candidates.groupby([by, "value"])["order"].rank(method="first")
        candidates = candidates[rank <= candidates.join(surplus, on=[by, "value"])["surplus"]]
    return candidates.index


def above_limit(rows: pd.DataFrame, by: str, limit: "int | pd.Series") -> pd.Index:
    """Return the rows to drop so that no group has more than its limit, in random order.

    Only rows that are `free` are dropped, if there is such a column.
    """
    excess = rows.groupby(by, observed=True).size() - limit
    free = rows[rows["free"]] if "free" in rows else rows
    rank = free.groupby(by, observed=True)["order"].rank(method="first")
    return free.index[rank <= free[by].map(excess).astype(float)]


def share_limit(counts: NDArray[np.int64], share: float, *, least: int, max_loss: float) -> int:
    """Return the largest limit with which no count is more than `share` of what is left.

    It is at least `least`. If the share cannot be reached (fewer than 1 / share members), or if
    more than `max_loss` of all would be dropped, it is the largest count: nothing is dropped.
    """
    ascending = np.sort(counts)
    if len(counts) * share < 1:
        return int(ascending[-1])
    # With every count cut to L, the total is sum(min(count, L)), and L may be `share` of that.
    below = np.concatenate([[0], np.cumsum(ascending)])
    highest = 0
    for place in range(len(counts) - 1, -1, -1):
        rest = 1 - share * (len(counts) - place)
        limit = math.inf if rest <= 0 else share * float(below[place]) / rest
        highest = int(min(limit, float(ascending[place])) + 1e-9)
        if place == 0 or min(limit, ascending[place]) >= ascending[place - 1]:
            break
    highest = max(highest, least)
    lost = int(np.maximum(counts - highest, 0).sum())
    return highest if lost <= max_loss * int(counts.sum()) else int(ascending[-1])
