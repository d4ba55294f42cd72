"""Choose tokens at random, with a seed for each row of a batch."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor


class Sampler:
    """Draws the tokens of several responses; each has random numbers of its own.

    A response uses one number per token, so it does not depend on the other rows of its batch, up
    to the rounding of batched kernels.

    Args:
        seeds: One seed per response.
        temperature: The logits are divided by it; more than 0.
        top_p: Only the most likely tokens whose probabilities sum up to this are drawn.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float = 1.0) -> None:
        self._random = [random.Random(seed) for seed in seeds]
        self._temperature, self._top_p = temperature, top_p

    def choose(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        """Return the next token of some of the responses.

        Args:
            logits: `[rows, vocabulary]`.
            rows: Number of the response of each row.
        """
        numbers = [self._random[row].random() for row in rows]
        # In double precision, so that the sums of a large vocabulary lose no small probability.
        probabilities = torch.softmax(logits.double() / self._temperature, dim=-1)
        if self._top_p == 1:
            return _drawn(probabilities, numbers)
        probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        places = _drawn(probabilities.masked_fill(before >= self._top_p, 0.0), numbers)
        chosen: list[int] = tokens.gather(1, torch.tensor(places, device=tokens.device)[:, None])[
            :, 0
        ].tolist()
        return chosen


def _drawn(weights: Tensor, numbers: Sequence[float]) -> list[int]:
    """Return the place in each row of `weights` at which their running sum passes a number.

    Args:
        weights: `[rows, places]`, none negative.
        numbers: From 0 to 1, as a share of the sum of the row.
    """
    sums = weights.cumsum(dim=-1)
    wanted = torch.tensor(numbers, dtype=sums.dtype, device=sums.device)[:, None] * sums[:, -1:]
    # `right`: a place of weight 0 has the same sum as the one before it and is never taken.
    places = torch.searchsorted(sums, wanted, right=True)
    last = (weights > 0).double().cumsum(dim=-1).argmax(dim=-1, keepdim=True)
    found: list[int] = torch.minimum(places, last)[:, 0].tolist()
    return found
