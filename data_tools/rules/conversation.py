"""Several questions with definite answers about one image."""

from collections.abc import Callable, Collection, Sequence
from typing import Final

from data_tools.rules import FAMILIES, families
from data_tools.rules.facts import Facts
from data_tools.rules.phrases import Exchange, Speaker

Asked = Callable[[Facts, Speaker, int], list[Exchange]]
"""Returns at most this many pairs of existence questions, one answered yes and one no."""

LIKELIHOOD: Final = 3.0
"""How much likelier a number above one, which is rarer, is to be asked for."""


def conversation(
    facts: Facts,
    speaker: Speaker,
    existence: Asked,
    turns: int,
    wanted: Collection[str] = FAMILIES,
) -> list[Exchange]:
    """Return about `turns` questions of the wanted families; none where nothing is certain.

    A description comes first or last, existence has as many yes as no, and the other families take
    turns. Where there is no room for all families, those asked are drawn.
    """
    left: Sequence[str] = ()
    if turns < len(wanted):  # else the same families would always be left out
        known: dict[str, Collection[object]] = {
            "description": facts.captions,
            "existence": facts.present,
            "counting": facts.counts,
            "halves": facts.halves,
            "relation": facts.pairs,
        }
        drawn = [name for name in speaker.shuffled(sorted(wanted)) if known[name]]
        wanted, left = drawn[:turns], drawn[turns:]
    description = families.description(facts, speaker) if "description" in wanted else []
    room = turns - len(description)
    found: list[Exchange] = []
    if "existence" in wanted and room > 0:
        alone = set(wanted) <= {"existence", "description"}
        found = existence(facts, speaker, max(1, room // 2 if alone else (room + 1) // 4))
        if not found and left:  # no category is absent: another family takes its place
            wanted = [*wanted, left[0]]
            if left[0] == "description":
                description = families.description(facts, speaker)
                room -= 1
    others: list[list[Exchange]] = []
    if "counting" in wanted:
        others.append(_larger_numbers_last(families.counting(facts, speaker), speaker))
    if "halves" in wanted:
        others.append(speaker.shuffled(families.halves(facts, speaker)))
    if "relation" in wanted:
        others.append(speaker.shuffled(families.relations(facts, speaker)))
    found += _in_turn(others, room - len(found))
    mixed = speaker.shuffled(found)
    return [*description, *mixed] if speaker.rng.random() < 0.5 else [*mixed, *description]


def _larger_numbers_last(exchanges: Sequence[Exchange], speaker: Speaker) -> list[Exchange]:
    keys = {
        id(exchange): speaker.rng.random() * (1.0 if exchange.answer == "one" else LIKELIHOOD)
        for exchange in exchanges
    }
    return sorted(exchanges, key=lambda exchange: keys[id(exchange)])


def _in_turn(queues: Sequence[list[Exchange]], room: int) -> list[Exchange]:
    """Return up to `room` exchanges, taken from the end of each queue in turn."""
    chosen: list[Exchange] = []
    while len(chosen) < room and any(queues):
        for queue in queues:
            if queue and len(chosen) < room:
                chosen.append(queue.pop())
    return chosen
