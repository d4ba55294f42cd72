"""The words of every rule, entered into the table of flags."""

from data_tools import wording
from data_tools.instruct.verify.describing import RELATIONS, action_stems, attribute_words
from data_tools.instruct.verify.flags import (
    ACTION,
    ATTRIBUTE,
    COUNTED,
    INTRODUCES,
    KIND,
    NUMBER,
    PERSON,
    PLACE,
    RELATION,
    STANCE,
    FlagTable,
)
from data_tools.instruct.verify.grammar import INTRODUCING
from data_tools.instruct.verify.numbers import AT_LEAST_TWO, NUMBERS
from data_tools.instruct.verify.placing import CUES
from data_tools.instruct.verify.stances import STANCE_CUES


def fill(table: FlagTable) -> None:
    """Enter the words of all rules."""
    facts = wording.load("facts")
    table.add(STANCE, STANCE_CUES)
    table.add(ATTRIBUTE, attribute_words())
    table.add(ACTION, action_stems())
    table.add(ACTION, ("take", "takes", "taking", "took"))
    table.add(RELATION, RELATIONS)
    kinds = [text for groups in facts["kinds"].values() for group in groups for text in group]
    table.add(KIND, (text.split()[0] for text in kinds))
    people = facts["people"]
    for name in ("male", "female", "infant", "adult", "grown", "small", "he", "she"):
        table.add(PERSON, people[name])
    table.add(PLACE, CUES)
    table.add(NUMBER, NUMBERS)
    table.add(NUMBER, AT_LEAST_TWO)
    table.add(COUNTED, ("many", "number"))
    table.add(INTRODUCES, INTRODUCING)
