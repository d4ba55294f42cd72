"""Answers by rules, in the form that servers answer in; no model, no network."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from data_tools.coco import AnnotatedImage
from data_tools.digests import hashed
from data_tools.instruct.schema import Answer, Failure, Request
from data_tools.rules.conversation import conversation
from data_tools.rules.existence import by_frequency
from data_tools.rules.facts import Facts
from data_tools.rules.phrases import Exchange, Speaker
from data_tools.rules.reasoning import detail, reasoning

VERSION: Final = "3"
"""Raised whenever the same request gets another answer."""
TURNS: Final = 6
"""Questions of a conversation."""


class RulesTeacher:
    """Answers with what follows from the boxes and captions shown.

    An answer is a function of the request, its image, and how frequent each category is.
    """

    def __init__(self, images: Mapping[int, AnnotatedImage]) -> None:
        self._images = images
        self._frequencies = Counter(name for image in images.values() for name in image.categories)

    async def ask(self, request: Request) -> Answer | Failure:
        return self.answer(request)

    def answer(self, request: Request) -> Answer | Failure:
        """Return what `ask` returns."""
        form = self._form(request)
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

    def _form(self, request: Request) -> dict[str, Any] | None:
        """Return the answer; None where nothing certain can be said."""
        facts = Facts(self._images[request.image], request.shown)
        seed = hashed(request.id)
        speaker = Speaker(np.random.default_rng(seed))
        if request.type == "detail":
            described = detail(facts, speaker)
            return described and {"answer": described[0], "evidence": described[1]}
        if request.type == "reasoning":
            reasoned = reasoning(facts, speaker)
            exchanges = [reasoned] if reasoned else []
        else:
            exchanges = conversation(facts, speaker, self._existence, TURNS)
        turns = [exchange.turn.model_dump(mode="json") for exchange in exchanges]
        return {"turns": turns} if turns else None

    def _existence(self, facts: Facts, speaker: Speaker, pairs: int) -> list[Exchange]:
        return by_frequency(facts, speaker, pairs, self._frequencies)

    async def close(self) -> None:
        """Do nothing: nothing is open."""
