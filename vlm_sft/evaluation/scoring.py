"""Compute the log-probabilities of several answers to several questions about one image.

The computation shares prefixes twice. The ids up to the end of the image run once, and their keys
and values are copied for every question; each question runs once, and its keys and values are
copied for every answer.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

from vlm_sft.data.images import ImageCrops
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.inference.shared_prefix import PrefixRunner, shared_length
from vlm_sft.model.language_model import head_logits

MAX_ANSWERS: Final = 32
"""Answers that are scored together; each needs a copy of the image's keys and values."""


@dataclass(frozen=True)
class Candidates:
    """A prompt, and the possible answers to it.

    Attributes:
        prompt: Token ids of the prompt, image tokens included.
        answers: Token ids of each answer, with the stop token; at least one id each.
    """

    prompt: list[int]
    answers: list[list[int]]


def score_answers(
    loaded: LoadedModel, questions: Sequence[Candidates], image: ImageCrops
) -> list[tuple[float, ...]]:
    """Return the summed log-probability of every answer after its prompt, in nats.

    Args:
        loaded: The model.
        questions: Prompts about one image, with text after the image, and their answers.
        image: The image.
    """
    if not questions:
        return []
    scorer = _Scorer(loaded, shared_length([question.prompt for question in questions]))
    prefix_cache = scorer.run_prefix(questions[0].prompt, image)
    scores: dict[int, tuple[float, ...]] = {}
    # Prompts of similar length share a batch, so little of it is padding.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    for batch in _batches(order, questions):
        found = scorer.score([questions[i] for i in batch], copy.deepcopy(prefix_cache))
        scores.update(zip(batch, found, strict=True))
    return [scores[i] for i in range(len(questions))]


def _batches(order: Sequence[int], questions: Sequence[Candidates]) -> Iterator[list[int]]:
    """Yield consecutive questions with up to `MAX_ANSWERS` answers, at least one question each."""
    batch: list[int] = []
    count = 0
    for index in order:
        num_answers = len(questions[index].answers)
        if batch and count + num_answers > MAX_ANSWERS:
            yield batch
            batch, count = [], 0
        batch.append(index)
        count += num_answers
    yield batch


class _Scorer:
    """Run the decoder on prefix, prompts and answers, reusing its KV cache."""

    def __init__(self, loaded: LoadedModel, length: int) -> None:
        self._loaded, self._shared_length = loaded, length
        self._runner = PrefixRunner(loaded)

    @torch.inference_mode()
    def run_prefix(self, prompt: Sequence[int], image: ImageCrops) -> Any:
        """Return the KV cache of the ids that all prompts share."""
        return self._runner.run_prefixes([prompt[: self._shared_length]], [image])

    @torch.inference_mode()
    def score(self, questions: Sequence[Candidates], cache: Any) -> list[tuple[float, ...]]:
        """Return the scores of each question's answers; `cache` is modified."""
        device = self._loaded.device
        tails = [question.prompt[self._shared_length :] for question in questions]
        owners = [i for i, question in enumerate(questions) for _ in question.answers]
        answers = [answer for question in questions for answer in question.answers]
        rows = torch.tensor(owners, device=device)

        # One row per question: the rest of its prompt after the shared prefix.
        cache.batch_repeat_interleave(len(questions))
        mask = torch.ones(len(questions), self._shared_length, dtype=torch.long, device=device)
        prompt_states, mask = self._runner.forward(tails, cache, mask)
        ends = torch.tensor([len(tail) - 1 for tail in tails], device=device)
        # The state of the last prompt token predicts the first token of each answer.
        states = prompt_states[torch.arange(len(tails), device=device), ends][rows][:, None]

        if max(map(len, answers)) > 1:
            # One row per answer: all its tokens but the last, which predicts nothing.
            cache.batch_select_indices(rows)
            answer_states, _ = self._runner.forward(
                [answer[:-1] for answer in answers], cache, mask[rows]
            )
            states = torch.cat([states, answer_states], dim=1)
        return _split(self._sum_log_probabilities(states, answers), questions)

    def _sum_log_probabilities(
        self, states: Tensor, answers: Sequence[Sequence[int]]
    ) -> list[float]:
        """Return the summed log-probability of each answer.

        Args:
            states: `[answers, tokens, width]`; `states[row, i]` predicts id i of answer `row`.
            answers: Token ids.
        """
        places = [
            (row, i, target)
            for row, answer in enumerate(answers)
            for i, target in enumerate(answer)
        ]
        rows, columns, targets = torch.tensor(places, device=states.device).unbind(dim=1)
        logits = head_logits(self._loaded.model.language_model, states[rows, columns]).float()
        found = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        sums = torch.zeros(len(answers), device=states.device).index_add(0, rows, found)
        return cast(list[float], sums.tolist())


def _split(scores: Sequence[float], questions: Sequence[Candidates]) -> list[tuple[float, ...]]:
    """Group the scores of all answers by question."""
    remaining = iter(scores)
    return [tuple(next(remaining) for _ in question.answers) for question in questions]
