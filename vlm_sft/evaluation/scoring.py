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
from torch.nn.utils.rnn import pad_sequence

from vlm_sft.data.images import ImageCrops
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.model.language_model import decoder_of, head_logits
from vlm_sft.utils.constants import IMAGE_TOKEN_ID

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
    scorer = _Scorer(loaded, _shared_length([question.prompt for question in questions]))
    prefix_cache = scorer.run_prefix(questions[0].prompt, image)
    scores: dict[int, tuple[float, ...]] = {}
    # Prompts of similar length share a batch, so little of it is padding.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    for batch in _batches(order, questions):
        found = scorer.score([questions[i] for i in batch], copy.deepcopy(prefix_cache))
        scores.update(zip(batch, found, strict=True))
    return [scores[i] for i in range(len(questions))]


def _shared_length(prompts: Sequence[list[int]]) -> int:
    """Return how many leading ids all prompts share, at most up to the end of the image.

    It is less than the length of every prompt, so each has at least one id of its own to predict
    the answer from.
    """
    # The common prefix of all prompts is that of the first and the last in sorted order.
    first, last = min(prompts), max(prompts)
    images = [i for i, token in enumerate(first) if token == IMAGE_TOKEN_ID]
    limit = min(*map(len, (first, last)), images[-1] + 2 if images else 1) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


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

    def __init__(self, loaded: LoadedModel, shared_length: int) -> None:
        self._loaded, self._shared_length = loaded, shared_length
        self._decoder = cast(Any, decoder_of(loaded.model.language_model))

    @torch.inference_mode()
    def run_prefix(self, prompt: Sequence[int], image: ImageCrops) -> Any:
        """Return the KV cache of the ids that all prompts share."""
        ids = torch.tensor([list(prompt[: self._shared_length])], device=self._loaded.device)
        (image_embeds,) = self._loaded.encode_images([image])
        embeds = self._loaded.model.embed(ids, image_embeds)
        return self._decoder(inputs_embeds=embeds, use_cache=True).past_key_values

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
        prompt_states, mask = self._forward(tails, cache, mask)
        ends = torch.tensor([len(tail) - 1 for tail in tails], device=device)
        # The state of the last prompt token predicts the first token of each answer.
        states = prompt_states[torch.arange(len(tails), device=device), ends][rows][:, None]

        if max(map(len, answers)) > 1:
            # One row per answer: all its tokens but the last, which predicts nothing.
            cache.batch_select_indices(rows)
            answer_states, _ = self._forward([answer[:-1] for answer in answers], cache, mask[rows])
            states = torch.cat([states, answer_states], dim=1)
        return _split(self._sum_log_probabilities(states, answers), questions)

    def _forward(
        self, tails: Sequence[Sequence[int]], cache: Any, cache_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states of `tails` after the cached tokens, and the mask of both.

        Tails are padded on the right, where causal attention hides the padding from all real
        tokens. Padding that is already in the cache is hidden by `cache_mask`, and positions
        continue from the last real token.
        """
        device = self._loaded.device
        ids = [torch.tensor(list(tail), dtype=torch.long, device=device) for tail in tails]
        padded = pad_sequence(ids, batch_first=True, padding_value=self._loaded.pad_token_id)
        real = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        mask = torch.cat([cache_mask, real], dim=1)
        steps = torch.arange(padded.shape[1], device=device)
        hidden = self._decoder(
            inputs_embeds=self._loaded.model.embed(padded, None),
            attention_mask=mask,
            position_ids=cache_mask.sum(dim=1, keepdim=True) + steps,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden, mask

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
