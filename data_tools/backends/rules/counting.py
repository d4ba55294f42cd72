"""How many? Only of what is drawn object by object: a category with a crowd region is not asked."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from data_tools import wording, words
from data_tools.backends.rules.phrases import Speaker
from data_tools.coco import AnnotatedImage
from data_tools.records import Exchange

MOST: Final = 8
"""More objects than this are not asked for: annotators stop counting."""


def ask(image: AnnotatedImage, speaker: Speaker) -> list[Exchange]:
    """One question for each category that can be counted."""
    texts = wording.load("questions")["counting"]
    exchanges = []
    for name in image.categories:
        boxes = image.of(name)
        if any(box.crowd for box in boxes) or len(boxes) > MOST:
            continue
        number = words.number(len(boxes))
        sentences = texts["one"] if len(boxes) == 1 else texts["several"]
        exchanges.append(
            Exchange(
                family="counting",
                question=speaker.say(texts["questions"], name),
                reply=speaker.reply(number, sentences, name),
                answer=number,
                category=name,
                kind="counting",
            )
        )
    return exchanges


def rarest_last(exchanges: Sequence[Exchange], rng: np.random.Generator) -> list[Exchange]:
    """In random order, with larger numbers, which are rarer, likelier to stand at the end."""
    keys = [
        float(rng.random()) * (1.0 if exchange.answer == "one" else 3.0) for exchange in exchanges
    ]
    return [exchanges[i] for i in np.argsort(keys, kind="stable")]
