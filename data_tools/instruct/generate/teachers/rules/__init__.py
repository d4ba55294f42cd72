"""Sentences read off the annotations, in the form that servers answer in; no model, no network."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from data_tools.coco import AnnotatedImage
from data_tools.instruct.generate.teachers.rules.conversation import conversation
from data_tools.instruct.generate.teachers.rules.detail import detail
from data_tools.instruct.generate.teachers.rules.facts import Facts
from data_tools.instruct.generate.teachers.rules.reasoning import reasoning
from data_tools.instruct.generate.teachers.rules.voice import Voice
from data_tools.instruct.schema import Answer, Failure, Request

VERSION: Final = "2"
"""Another number whenever another answer is given to the same request."""

WRITERS: Final[Mapping[str, Callable[[Facts, Voice], dict[str, Any] | None]]] = {
    "conversation": conversation,
    "detail": detail,
    "reasoning": reasoning,
}
"""By type of sample: the answer, or None where nothing certain can be said."""


class RulesTeacher:
    """Answers by rules: what it says follows from the boxes and captions shown.

    An answer is a function of the request, its image, and how frequent each category is.
    """

    def __init__(self, images: Mapping[int, AnnotatedImage]) -> None:
        self._images = images
        self._frequencies = Counter(name for image in images.values() for name in image.categories)

    async def ask(self, request: Request) -> Answer | Failure:
        return self.answer(request)

    def answer(self, request: Request) -> Answer | Failure:
        """What `ask` returns."""
        facts = Facts(self._images[request.image], request.shown)
        seed = int.from_bytes(hashlib.sha256(request.id.encode()).digest()[:8], "big")
        voice = Voice(np.random.default_rng(seed), self._frequencies)
        form = WRITERS[request.type](facts, voice)
        if form is None:
            return Failure(
                request=request.id,
                sample_id=request.sample_id,
                reason="nothing_to_say",
                message=f"the annotations shown leave nothing certain to say for {request.type}",
            )
        return Answer(
            request=request.id,
            teacher="rules",
            text=json.dumps(form, ensure_ascii=False),
            finish="stop",
            model=f"rules@{VERSION}",
            usd=0.0,
        )

    async def close(self) -> None:
        """Nothing is open."""
