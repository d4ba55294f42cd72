"""What is set aside, step by step: repeats first, then whatever outweighs the rest."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from data_tools.instruct.clean import balance
from data_tools.instruct.clean.codes import CODE
from data_tools.instruct.clean.table import NO_GROUP, TYPES, Table, family_values
from data_tools.instruct.config import AnswerBalanceConfig, CleanConfig, OpeningsConfig
from data_tools.instruct.schema import SampleType

ROUNDS: Final = 20
"""Balancing one thing can tilt another, so all is done again until nothing changes."""


def mark_images(table: Table, repeats: Mapping[int, int], unreadable: Mapping[int, str]) -> None:
    """Set aside samples on images that repeat an earlier one, or cannot be opened."""
    first_on: dict[int, int] = {}
    for number, image in enumerate(table.images.tolist()):
        first_on.setdefault(image, number)
        if image in unreadable:
            table.sample_codes[number] = CODE["IMAGE_UNREADABLE"]
        elif image in repeats:
            table.sample_codes[number] = CODE["IMAGE_DUPLICATE"]
            table.causes[number] = first_on[repeats[image]]


def mark_questions(table: Table) -> None:
    """Set aside questions that an earlier turn asks of the same image, with what leans on them.

    A later turn that refers back to such a question goes with it.
    """
    turns = np.flatnonzero(table.live_turns())
    _, first, which = np.unique(table.questions[turns], return_index=True, return_inverse=True)
    again = np.zeros(len(table.turn_codes), np.bool_)
    again[turns] = first[which] != np.arange(len(turns))
    owners = table.owners
    table.turn_causes[turns] = np.where(again[turns], owners[turns[first[which]]], -1)
    for turn in np.flatnonzero(again):
        follower = turn + 1
        while follower < len(again) and owners[follower] == owners[turn] and table.leans[follower]:
            again[follower] = True
            if table.turn_causes[follower] < 0:
                table.turn_causes[follower] = table.turn_causes[turn]
            follower += 1
    table.turn_codes[again] = CODE["SAME_QUESTION"]


def mark_balance(
    table: Table, config: CleanConfig, categories: Mapping[int, tuple[int, ...]]
) -> int:
    """Set aside what caps, shares and balances ask for; returns the rounds it took.

    Args:
        table: Changed in place.
        config: What is wanted.
        categories: The categories of each image, as numbers.
    """
    for done in range(1, ROUNDS + 1):
        before = int(table.live_turns().sum())
        _mark_image_cap(table, config.max_per_image)
        _mark_category_cap(table, config.max_per_category, categories)
        _mark_type_shares(table, config.type_shares)
        if config.openings is not None:
            _mark_openings(table, config.openings)
        _mark_answers(table, config.answers)
        if int(table.live_turns().sum()) == before:
            return done
    return ROUNDS


def _mark_image_cap(table: Table, limit: int | None) -> None:
    live = np.flatnonzero(table.live_samples())
    if limit is None or not len(live):
        return
    _, keys = np.unique(table.images[live], return_inverse=True)
    limits = np.full(int(keys.max()) + 1, limit)
    over = balance.over_cap(keys, limits, order=table.orders[live])
    table.sample_codes[live[over]] = CODE["IMAGE_CAP"]


def _mark_category_cap(
    table: Table, cap: int | None, categories: Mapping[int, tuple[int, ...]]
) -> None:
    live = np.flatnonzero(table.live_samples())
    if cap is None or not len(live):
        return
    of_samples = [categories[int(image)] for image in table.images[live]]
    order = np.argsort(table.orders[live], kind="stable")
    taken = balance.by_rarest_category(of_samples, order, cap)
    table.sample_codes[live[~taken]] = CODE["CATEGORY_CAP"]


def _mark_type_shares(table: Table, shares: Mapping[SampleType, float] | None) -> None:
    live = np.flatnonzero(table.live_samples())
    if not shares or not len(live) or sum(shares.values()) <= 0:
        return
    keys = table.types[live].astype(np.int64)
    counts = np.bincount(keys, minlength=len(TYPES))
    wanted = np.array([shares.get(name, 0.0) for name in TYPES])
    wanted[counts == 0] = 0  # the figures say that such a type's share was not reached
    if not wanted.any():
        return
    limits = balance.in_proportion(counts, wanted)
    over = balance.over_cap(keys, limits, order=table.orders[live])
    table.sample_codes[live[over]] = CODE["TYPE_SHARE"]


def _mark_openings(table: Table, config: OpeningsConfig) -> None:
    live, free = table.live_turns(), free_turns(table)
    types = table.types[table.owners]
    for number in range(len(TYPES)):
        turns = np.flatnonzero(live & (types == number) & (table.openings != 0))
        if not len(turns):
            continue
        _, keys, counts = np.unique(table.openings[turns], return_inverse=True, return_counts=True)
        limit = balance.share_limit(
            counts, config.max_share, least=config.least, max_loss=config.max_loss
        )
        over = balance.over_cap(
            keys, np.full(len(counts), limit), order=table.turn_orders[turns], free=free[turns]
        )
        table.turn_codes[turns[over]] = CODE["OPENING_CAP"]


def _mark_answers(table: Table, config: AnswerBalanceConfig) -> None:
    """Level each category within a kind, then each kind, then the family as a whole."""
    names = table.group_names
    for family in sorted({name[0] for name in names}):
        of_family = np.array([name[0] == family for name in names])
        kinds = _numbered([name[1] for name in names])
        fine = np.arange(len(names))
        for coarse in (fine, kinds, np.zeros(len(names), np.int64)):
            turns = np.flatnonzero(table.live_turns() & _in_groups(table.groups, of_family))
            if not len(turns):
                continue
            groups = table.groups[turns]
            goes = balance.level(
                coarse[groups],
                fine[groups],
                table.values[turns].astype(np.int64),
                len(family_values(family)),
                order=table.turn_orders[turns],
                free=free_turns(table)[turns],
                ratio=config.ratio,
                slack=config.slack,
            )
            table.turn_codes[turns[goes]] = CODE["ANSWER_BALANCE"]


def free_turns(table: Table) -> NDArray[np.bool_]:
    """Live turns that may go without the rest: the next live one does not refer back to them."""
    live = table.live_turns()
    turns = np.flatnonzero(live)
    owners = table.owners[turns]
    leaned_on = np.zeros(len(turns), np.bool_)
    leaned_on[:-1] = (owners[1:] == owners[:-1]) & table.leans[turns[1:]]
    free = np.zeros(len(live), np.bool_)
    free[turns] = ~leaned_on
    return free


def _in_groups(groups: NDArray[np.int32], wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inside = groups != NO_GROUP
    inside[inside] = wanted[groups[inside]]
    return inside


def _numbered(names: Sequence[str]) -> NDArray[np.int64]:
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return np.array([numbers[name] for name in names], np.int64)
