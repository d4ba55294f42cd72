"""Runs that samples are grown from, and a teacher that answers what every operator asks."""

import json
import re
from pathlib import Path
from typing import Any

from tests.data_tools.coco_files import write_coco

FIRST = [
    {"question": "How many dogs are there?", "answer": "Two.", "kind": "count", "evidence": []},
    {"question": "Is there a cat?", "answer": "No, there is no cat.", "kind": "existence",
     "evidence": []},
]  # fmt: skip
"""What the teacher says of each image; the rules accept it."""


def turn(question: str, answer: str, kind: str = "object") -> dict[str, Any]:
    return {"question": question, "answer": answer, "kind": kind, "evidence": []}


def turns(*given: dict[str, Any]) -> str:
    return json.dumps({"turns": list(given)})


_SEVERAL = [
    turn("How many dogs are in the first picture?", "There are two dogs.", "count"),
    turn("What lies under the dogs in the second picture?", "A lawn."),
    turn("How many dogs are in the third picture?", "There are two dogs.", "count"),
    turn("What is in the fourth picture?", "There are two dogs."),
]
_REPLIES = {
    "in other words": [turn("What number of dogs can be seen?", "There are two.", "count"),
                       turn("Can you see a cat?", "No, there is none.", "existence")],
    "the harder": [turn("What are the two animals on the lawn?", "They are dogs.")],
    "the new conversation": [turn("What is under the animals?", "A lawn.")],
    "with reasons": [turn("How many dogs are there?", "A dog is on the left. Answer: 2", "count"),
                     turn("Is there a cat?", "Only dogs are here. Answer: No", "existence")],
    "next turns": [turn("Where are they?", "They are on a lawn.")],
    "Answer the questions, as": [FIRST[0], turn("Is there a cat?", "No.", "existence")],
    "one more condition": [turn("Which animals stand on the lawn?", "Two dogs.")],
    "more particular": [turn("On what surface do both dogs stand?", "On a lawn.")],
    "several steps": [turn("If one dog left, would one stay?", "Two less one, so one.")],
    "more given": [turn("My aunt fears cats. May she come here?", "Yes, no cat is here.")],
    "seldom asked": [turn("What do the animals have below them?", "A lawn.")],
    "new questions about": [turn("Name the kind of pet.", "These are dogs.")],
    "into German": [turn("Wie viele Hunde sind auf diesem Bild zu sehen?", "Es sind 2."),
                    turn("Ist auf dem Bild eine Katze zu sehen?", "Nein, es ist keine Katze da.")],
    "into English": FIRST,
}  # fmt: skip
"""By words of a request's last line."""


def good_reply(text: str) -> str:
    """What a good teacher says to the last message of a request, whatever the operator.

    The image shows two dogs on a lawn, and the parent's turns are `FIRST`.
    """
    last = text.splitlines()[-1]
    if "why they cannot be answered" in last:
        return turns(*(answered(line) for line in text.splitlines() if line[:1] == "q"))
    if "about all images" in last:
        return turns(*_SEVERAL[: len(re.findall(r"IMAGE \d:", text))])
    if "Write the answer" in last:
        return json.dumps({"answer": "Two dogs are on a lawn.", "evidence": []})
    return turns(*next(said for words, said in _REPLIES.items() if words in last))


def answered(line: str) -> dict[str, Any]:
    """What a good teacher says to a question of `refuse` about two dogs on a lawn."""
    question = json.loads(line.split(": ", 1)[1])
    absent = next((n for n in ("cat", "bus", "apple", "car", "cup") if f" {n}" in question), None)
    if "many" in question or "number" in question:
        return turn(question, "There are two dogs.")
    if "color" not in question and "made" not in question:
        return turn(question, f"No, there is no {absent}." if absent else "Yes, there are dogs.")
    return turn(question, f"That cannot be told, because there is no {absent} in the image.")


def configured(root: Path, url: str, images: Any = 1, **teacher: Any) -> Path:
    """A configuration of a run about images of two dogs on a lawn, or of other boxes."""
    boxes = [("dog", [10.0, 10, 40, 40], 0), ("dog", [60, 10, 40, 40], 0)]
    given = images if isinstance(images, dict) else dict.fromkeys(range(1, images + 1), boxes)
    files = write_coco(root, given, {n: ["Two dogs on a lawn."] for n in given})
    config = {
        "output_dir": str(root / "run"),
        "coco": {name: str(files[name]) for name in ("instances", "captions", "images")},
        "requests": {"shares": {"conversation": 1, "detail": 0, "reasoning": 0}},
        "teacher": {"kind": "openai", "model": "m", "base_url": url, "structured": "none",
                    "backoff_seconds": 0.02, "attempts": 3, "concurrency": 2} | teacher,
        "clean": {"same_images": {"action": "keep"}},  # all are gray
    }  # fmt: skip
    (root / "run.yaml").write_text(json.dumps(config))
    return root / "run.yaml"
