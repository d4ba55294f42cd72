"""Generate responses to a few validation records during training."""

from collections.abc import Callable
from typing import Any

import torch

from vlm_sft.data.batch import LoadError
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.images import thumbnail
from vlm_sft.data.tokenize import ChatTokenizer, expand
from vlm_sft.errors import RecordError
from vlm_sft.inference.generate import generate_greedy
from vlm_sft.model.vlm import VisionLanguageModel

MAX_NEW_TOKENS = 64
"""Length of the responses that are generated during training."""


SHOWN_SIDE = 256
"""Longest side of the images that are kept for the report, in pixels."""


class SampleGenerator:
    """Generates the model's responses to the first question of a few validation records.

    Args:
        model: In evaluation mode when it is called.
        chat_tokenizer: Tokenizer and chat template.
        dataset: The validation records.
        num_samples: Number of records, spread evenly over the dataset.
        max_new_tokens: Longer responses are cut.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        chat_tokenizer: ChatTokenizer,
        dataset: SupervisedDataset,
        num_samples: int,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        self._model = model
        self._chat_tokenizer = chat_tokenizer
        self._dataset = dataset
        self._num_samples = min(num_samples, len(dataset))
        self._max_new_tokens = max_new_tokens

    def __call__(self, on_error: Callable[[LoadError], None] | None) -> list[dict[str, Any]]:
        """Return rows of `id`, `question`, `answer`, `expected`, and `images` as JPEG files.

        Args:
            on_error: Called with each record whose image cannot be read, which gets no row; None:
                such a record raises.

        Raises:
            RecordError: An image cannot be read and `on_error` is None.
        """
        rows = []
        for number in range(self._num_samples):
            index = number * len(self._dataset) // self._num_samples
            try:
                rows.append(self._row(index))
            except RecordError as error:
                if on_error is None:
                    raise
                on_error(LoadError.of(index, error))
        return rows

    def _row(self, index: int) -> dict[str, Any]:
        conversation = self._dataset.conversation(index)
        first = next(i for i, t in enumerate(conversation.turns) if t.role == "assistant")
        turns = conversation.turns[:first]
        num_images = len(list(Conversation("", turns).image_parts()))
        question = Conversation(conversation.id, turns, conversation.images[:num_images])
        prompt = self._chat_tokenizer.prompt(question)
        images = [
            self._dataset.image_crops(index, number, num_images=num_images)
            for number in range(num_images)
        ]
        layouts = [image.layout for image in images]
        (answer,) = generate_greedy(
            self._model,
            self._chat_tokenizer,
            [expand(prompt, [layout.num_tokens for layout in layouts])],
            pixel_values=torch.cat([image.pixels for image in images]) if images else None,
            layouts=layouts,
            max_new_tokens=self._max_new_tokens,
        )
        return {
            "id": conversation.id,
            "question": turns[-1].text if turns else "",
            "answer": answer,
            "expected": conversation.turns[first].text,
            "images": [thumbnail(source, SHOWN_SIDE) for source in question.images],
        }
