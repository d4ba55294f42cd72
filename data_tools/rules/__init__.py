"""Questions and answers that follow from boxes and captions, without a model.

    facts.py         what is certain of an image: presence, numbers, halves, left and right
    phrases.py       filling the patterns of `wording/questions.json` with names in correct grammar
    families.py      captions, description, existence, counting, halves, relation: single questions
    existence.py     which present and absent categories are asked about
    conversation.py  several of them in one conversation
    reasoning.py     questions in two steps, and descriptions in detail
    datasets.py      the contents of `build_coco`'s files, checked by the verifier
    build.py         what `build_coco` does: annotations in, files out
    pope.py          what `pope` does: POPE's questions, about images that no training record has

`data_tools.build_coco` and the teacher `rules` of `data_tools.instruct` write these sentences.
"""

from typing import Final, Literal

Family = Literal[
    "caption", "description", "existence", "counting", "halves", "relation", "reasoning"
]

FAMILIES: Final[tuple[Family, ...]] = (
    "description", "existence", "counting", "halves", "relation",
)  # fmt: skip
"""What a conversation can ask about."""

PROBE_FAMILIES: Final = ("existence", "counting", "halves")
"""Families of single questions for evaluations."""

FILES: Final = ("stage1", "stage2", *PROBE_FAMILIES)
"""Files of `build_coco`, without the ending."""

DEFAULT_PROBES: Final = 6
"""Single questions an image and family."""

POPE_SAMPLINGS: Final = ("random", "popular", "adversarial")
"""POPE (Li et al. 2023, section 4): any absent category, a frequent one, or a usual companion."""

POPE_FILES: Final = (*(f"pope_{name}.jsonl" for name in POPE_SAMPLINGS), "pope.json")
"""Files of `pope`; the last one is the summary."""
