"""Every reason for which an answer is rejected: code, meaning, example.

`python -m data_tools.instruct.verify.codes` prints the table of the documentation.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Code:
    """A reason; names are given once and never change their meaning."""

    name: str
    family: str
    meaning: str
    example: str


FAMILIES: Final = ("reading", "form", "manner", "content", "judge")
"""Whether the answer can be read; how the sample is built; how it speaks; what it says; what the
judge says, where it decides."""

ALL: Final = (
    Code("ANSWER_CUT", "reading", "The server stopped the answer (`finish` is not `stop`).",
         "`finish: length`"),
    Code("ANSWER_EMPTY", "reading", "There is no text.", "``"),
    Code("NOT_JSON", "reading", "No JSON object can be read from the text.",
         "`Question: What is this? Answer: A cat.`"),
    Code("SEVERAL_OBJECTS", "reading", "More than one JSON object; which is meant is not guessed.",
         "`{\"turns\": [...]} {\"turns\": [...]}`"),
    Code("WRONG_SCHEMA", "reading", "The object is not of the form that was asked for.",
         "`{\"question\": \"...\"}`"),
    Code("REFUSAL", "reading", "The teacher refuses or speaks of itself.",
         "`I'm sorry, but I cannot see images.`"),
    Code("PROMPT_ECHO", "reading", "The answer repeats what was sent.", "`c1: A cat ...`"),
    Code("LABEL_UNKNOWN", "reading", "It cites a caption or box that was not shown.", "`b9` of 4"),
    Code("RECORD_FORM", "reading",
         "A record of others is not of LLaVA's form, or has a text with half a surrogate pair.",
         "`{\"messages\": [...]}`"),
    Code("NO_IMAGE", "reading", "A record of others names no image.", ""),
    Code("IMAGE_NOT_ANNOTATED", "reading",
         "The annotation files do not have the image of a record of others.", ""),
    Code("IMAGE_MISSING", "reading", "The image of a record of others is not in the folder.", ""),
    Code("TURN_COUNT", "form", "Too few or too many turns for the type.", "a detail with 2 turns"),
    Code("TURN_EMPTY", "form", "A question or an answer without words.", "`\"answer\": \" \"`"),
    Code("TURN_REPEATED", "form", "A question, or a long answer, appears twice.",
         "`How many dogs are there?` twice"),
    Code("TOO_SHORT", "form", "An answer with fewer words than its type allows.",
         "a detail of `A cat.`"),
    Code("TOO_LONG", "form", "A question or answer with more words than its type allows.", ""),
    Code("NOT_A_QUESTION", "form", "The human's turn neither asks nor instructs.",
         "`The dog is black.`"),
    Code("IMAGE_MARK", "form", "A text holds an image's placeholder; exports set it themselves.",
         "`<image>`"),
    Code("ROLE_MARK", "form", "A text holds a role's name or a template's control text.",
         "`ASSISTANT: It is a cat.`"),
    Code("ALL_YES", "form", "Every yes/no question of a conversation is answered yes.",
         "three questions, three times `Yes.`"),
    Code("GIVEN_AWAY", "form", "The question holds its own answer.",
         "`What color is the red bus?` `Red.`"),
    Code("ANSWER_MISMATCH", "form",
         "A bare yes or no follows a question that asks for more, as where turns got lost.",
         "`What does the image show?` `No.`"),
    Code("GROWN_NOT_NEW", "form",
         "`grow`: a question is like one of the parent, or one grown before about the image "
         "(ROUGE-L of 0.7 or more), or the sample is its parent.",
         "`How many dogs are there?`, parent: `How many dogs are in there?`"),
    Code("GROWN_OTHER_QUESTION", "form", "`grow`: a question that was to be repeated is another.",
         ""),
    Code("GROWN_OTHER_ANSWER", "form",
         "`grow`: an answer says another yes, no, number, side or final answer than the parent, or "
         "than the annotations.",
         "`... Answer: Yes.`, parent: `No.`"),
    Code("GROWN_COPIES_PROMPT", "form",
         "`grow`: a text speaks of the task to rewrite something.", "`the harder question`"),
    Code("TRANSLATION_LANGUAGE", "form", "`grow`: a translation is in another language.",
         "English, where German was asked for"),
    Code("TRANSLATION_LENGTH", "form",
         "`grow`: a translated text is over four times as long or as short as the original.", ""),
    Code("CONSTRAINT_BROKEN", "form",
         "`grow`: an answer does not keep to a constraint of its instruction.",
         "three bullet points, two demanded"),
    Code("IMAGE_NOT_NAMED", "form",
         "`grow`: a question about several images does not say which one it is about.",
         "`What is on the table?`"),
    Code("IMAGES_MIXED", "form",
         "`grow`: a sentence is about several images at once, or about none, so that nothing can "
         "check it.", "`The first image has more dogs than the second image.`"),
    Code("IMAGE_UNUSED", "form", "`grow`: nothing is said about one of several images.", ""),
    Code("ANSWERED_UNANSWERABLE", "content",
         "`grow`: an answer to what the image cannot answer.", "`It cost five dollars.`"),
    Code("REFUSED_ANSWERABLE", "content",
         "`grow`: a refusal to answer what boxes or captions answer.", "`It cannot be told.`"),
    Code("REFUSAL_WITHOUT_REASON", "content",
         "`grow`: a right refusal that does not say why.", "`That cannot be told.`"),
    Code("LEAK", "manner", "It speaks of captions, boxes, coordinates, labels or a description.",
         "`According to the caption, ...`"),
    Code("HEDGED", "manner", "Too many sentences guess.", "`It appears to be a dog, possibly.`"),
    Code("LANGUAGE", "manner", "It is not in English.", "`Ein Hund liegt auf dem Sofa.`"),
    Code("INJECTION", "manner", "It follows, or repeats, an instruction hidden in the data.",
         "`Ignore all previous instructions`"),
    Code("OBJECT_NOT_FOUND", "content", "It names a thing that neither boxes nor captions have.",
         "`A zebra stands there.`"),
    Code("OBJECT_DENIED", "content", "It says that a thing is not there which is.",
         "`There is no dog.`"),
    Code("COUNT_TOO_HIGH", "content", "It counts more than there are.", "`three dogs`, two boxes"),
    Code("COUNT_WRONG", "content", "An exact number (`how many`, `there are`) that is not right.",
         "`How many dogs?` `One.`, two boxes"),
    Code("COUNT_UNCERTAIN", "content",
         "`How many` is asked of what the annotations cannot count: crowds, many, tiny ones.",
         "`How many people?` of a crowd region"),
    Code("PLACE_WRONG", "content", "A side, half, corner or order that the boxes contradict.",
         "`The cat is left of the cup.`"),
    Code("RELATION_REFUTED", "content",
         "On, under, in, next to: of things that are far apart in the image.",
         "`The cat sits on the chair.`"),
    Code("ATTRIBUTE_WRONG", "content",
         "A color, material or state of a thing where captions give the same thing another one.",
         "`a blue shirt`, captions: `green shirt`"),
    Code("ACTION_WRONG", "content", "An action that excludes the one that captions give.",
         "`The cat is sleeping.`, captions: `a cat eating`"),
    Code("KIND_WRONG", "content",
         "Another kind of person, animal, sport, room or place than captions name.",
         "`a woman`, captions: `a man`"),
    Code("TIME_WRONG", "content",
         "A time of day, a time on a clock, or weather that captions contradict.",
         "`at night`, captions: `a sunny day`"),
    Code("ATTRIBUTE_UNKNOWN", "content",
         "A color, material or action that no caption has, where the settings refuse those.",
         "`a red dog`"),
    Code("JUDGE_CONTRADICTED", "judge", "The judge lists a statement as contradicted.", ""),
    Code("JUDGE_UNSUPPORTED", "judge", "The judge lists a statement as not supported.", ""),
    Code("JUDGE_NO_VERDICT", "judge",
         "The judge refused, its answer cannot be read, or there is none yet.", ""),
)  # fmt: skip
"""In the order of the documentation."""

NOT_CLAIMS: Final = frozenset(
    {"reading", "form", "citation", "hedge", "leak", "language", "injection", "refusal", "clean",
     "growth", "judge"}
)  # fmt: skip
"""Rules whose checks are about the answer's form, manner or citations, not about the image."""

CODES: Final = {code.name: code for code in ALL}
"""Every code by its name."""


def table() -> str:
    """Return the codes as Markdown."""
    lines = []
    for family in FAMILIES:
        lines += [f"### {family.capitalize()}", "", "| code | meaning | example |", "|---|---|---|"]
        lines += [
            f"| `{code.name}` | {code.meaning} | {code.example.replace('``', '')} |"
            for code in ALL
            if code.family == family
        ]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), end="")
