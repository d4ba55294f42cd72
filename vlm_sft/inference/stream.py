"""Stream the text of a response while it is generated."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextIteratorStreamer

from vlm_sft.data.image_layout import ImageLayout
from vlm_sft.model.vlm import VisionLanguageModel


def stream_text(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    layouts: Sequence[ImageLayout] | None,
    **generation_kwargs: Any,
) -> Iterator[str]:
    """Yield the decoded text of one response in pieces, without special tokens.

    Generation runs in a thread and stops if the iterator is closed. An exception of the thread is
    raised here.

    Args:
        model: In evaluation mode.
        tokenizer: Decodes the response.
        input_ids: The prompt, `[1, T]`.
        pixel_values: The crops of its images, uint8 `[N, 3, H, W]`; or None.
        layouts: The layout of each image; None: every image is one crop.
        **generation_kwargs: For transformers' `generate`.
    """
    streamer = TextIteratorStreamer(cast(Any, tokenizer), skip_special_tokens=True)
    stop = _StopRequested()
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            model.generate(
                input_ids,
                torch.ones_like(input_ids),
                pixel_values,
                layouts,
                streamer=_ResponseOnly(streamer),
                stopping_criteria=[stop],
                **generation_kwargs,
            )
        except BaseException as error:
            errors.append(error)
        finally:
            streamer.end()  # also after an error, or the loop below would wait forever

    thread = threading.Thread(target=generate, name="generate", daemon=True)
    thread.start()
    try:
        yield from filter(None, streamer)
    finally:
        stop.requested.set()
        thread.join()
    if errors:
        raise errors[0]


class _StopRequested(StoppingCriteria):
    """Stops generation when the consumer of the stream has closed it."""

    def __init__(self) -> None:
        self.requested = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full(
            (input_ids.shape[0],),
            self.requested.is_set(),
            dtype=torch.bool,
            device=input_ids.device,
        )


class _ResponseOnly:
    """Passes the tokens of the response on to a streamer.

    `generate` begins with the ids of the prompt, which are empty when it is given embeddings.
    """

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer

    def put(self, value: Tensor) -> None:
        if value.numel():
            self._streamer.put(value)

    def end(self) -> None:
        """Do nothing: the thread ends the stream, also after an error."""
