"""Generate for many requests at once: requests join and leave the running batch between steps.

One thread owns the model. Each row of the batch is one choice of one request. A new request is run
alone up to its first token; its keys and values are then appended to those of the batch, padded on
the left to equal length. Padding is masked out, and positions count real tokens only, so a row's
tokens do not depend on the other rows (up to the rounding of batched kernels).
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from vlm_sft.data.images import ImageCrops
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.model.language_model import causal_lm, decoder_of, head_logits

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length"]

MAX_LOGPROBS: Final = 20
"""Largest number of alternatives per token."""


@dataclass(frozen=True)
class Sampling:
    """How a response is generated.

    Attributes:
        max_tokens: The response is cut after this number of tokens.
        temperature: 0 takes the most likely token.
        top_p: Tokens are sampled from the smallest set with at least this probability.
        stop: Texts that end the response; they are not part of it.
        seed: Seed of the first choice; choice k has `seed + k`. None: not reproducible.
        num_choices: Number of responses.
        logprobs: Number of alternatives per token; None: no log-probabilities.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    num_choices: int = 1
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token and the most likely tokens at its position, most likely first."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """Progress of one choice of a request.

    Attributes:
        choice: Number of the choice.
        text: New text.
        logprobs: Log-probabilities of the new tokens.
        finish_reason: Set on the last piece of the choice.
        num_tokens: Tokens generated so far.
    """

    choice: int
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    num_tokens: int = 0


@dataclass
class Job:
    """A request to the engine.

    Attributes:
        prompt_ids: Token ids, with `IMAGE_TOKEN_ID` once per image token.
        images: The images of the prompt, in order.
        sampling: How to generate.
        emit: Called in the engine's thread with each `Piece`, and with an exception if the request
            failed.
        cancelled: Set by the caller to leave the batch.
        num_started: Number of choices that have been added to the batch.
    """

    prompt_ids: list[int]
    images: Sequence[ImageCrops]
    sampling: Sampling
    emit: Callable[[Piece | Exception], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    num_started: int = 0


class QueueFull(Exception):
    """There are as many waiting requests as allowed."""


class Stopped(Exception):
    """The engine does not run any more."""


class Engine:
    """Runs jobs on a model in its own thread.

    Args:
        loaded: The model.
        max_batch: Largest number of responses that are generated together.
        max_queue: Largest number of jobs that wait.

    Attributes:
        joins: Whether requests can join a running batch.
    """

    def __init__(self, loaded: LoadedModel, *, max_batch: int = 16, max_queue: int = 128) -> None:
        self._loaded = loaded
        self.joins = can_join(loaded)
        self.max_batch = max_batch if self.joins else 1
        self.max_queue = max_queue
        self._queue: deque[Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._batch = _Batch(loaded)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Number of jobs that wait."""
        return sum(not job.cancelled.is_set() for job in tuple(self._queue))

    @property
    def running(self) -> int:
        """Number of responses in the batch."""
        return len(self._batch)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFull: `max_queue` jobs are waiting.
            Stopped: The engine was closed, or its thread has ended.
        """
        with self._wake:
            if self._stopping or not self.alive:
                raise Stopped
            if len(self._queue) >= self.max_queue:
                waiting = [job for job in self._queue if not job.cancelled.is_set()]
                if len(waiting) >= self.max_queue:
                    raise QueueFull
                self._queue = deque(waiting)
            self._queue.append(job)
            self._wake.notify()

    def close(self) -> None:
        """Stop after the current step; unfinished jobs get an error."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or len(self._batch) or self._stopping)
                if self._stopping:
                    break
            try:
                self._admit()
                self._batch.step()
            except Exception as error:
                logger.exception("generation failed")
                self._batch.fail(error)
        ended = RuntimeError("the server is shutting down")
        self._batch.fail(ended)
        for job in self._queue:
            job.emit(ended)
        self._queue.clear()

    def _admit(self) -> None:
        """Move waiting jobs into the batch while there is room."""
        while True:
            with self._wake:
                if not self._queue:
                    return
                job = self._queue[0]
                wanted = job.sampling.num_choices if self.joins else 1
                if len(self._batch) and len(self._batch) + wanted > self.max_batch:
                    return
                choices = range(job.num_started, job.num_started + wanted)
                job.num_started += wanted
                if job.num_started >= job.sampling.num_choices:
                    self._queue.popleft()
            if job.cancelled.is_set():
                continue
            try:
                self._batch.add(job, choices)
            except Exception as error:
                logger.exception("a prompt could not be processed")
                job.cancelled.set()
                job.emit(error)


def can_join(loaded: LoadedModel) -> bool:
    """Return whether requests can join a running batch of this language model.

    Layers with a sliding window keep a part of the keys only, and state-space layers none; such
    models answer one request after another.
    """
    cache = DynamicCache(config=causal_lm(loaded.model.language_model).config)
    return all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)


@dataclass
class _Row:
    """One choice of a job in the batch."""

    job: Job
    choice: int
    generator: torch.Generator | None
    ids: list[int] = field(default_factory=list)
    text: str = ""  # decoded so far
    sent: int = 0  # characters of `text` that were emitted
    pending: list[TokenLogprob] = field(default_factory=list)


class _Batch:
    """The rows that are generated together, with their keys and values."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._decoder = cast(Any, decoder_of(loaded.model.language_model))
        self._stop_ids = frozenset(loaded.chat_tokenizer.eot_token_ids)
        self._anchor = loaded.tokenizer.encode("a", add_special_tokens=False)
        self._rows: list[_Row] = []
        self._cache: Any = None
        self._mask = torch.zeros(0, 0)

    def __len__(self) -> int:
        return len(self._rows)

    def fail(self, error: Exception) -> None:
        """Report an error to every job, and empty the batch."""
        for job in {id(row.job): row.job for row in self._rows}.values():
            job.cancelled.set()
            job.emit(error)
        self._rows, self._cache = [], None

    @torch.inference_mode()
    def add(self, job: Job, choices: range) -> None:
        """Run a prompt, take the first tokens of some of its choices, and append their rows."""
        device = self._loaded.device
        ids = torch.tensor([job.prompt_ids], device=device)
        embeds = None
        if job.images:
            embeds = torch.cat(self._loaded.encode_images(list(job.images)))
            if job.num_started >= job.sampling.num_choices:
                job.images = ()  # not needed any more
        cache = DynamicCache(config=causal_lm(self._model.language_model).config)
        output = self._decoder(
            inputs_embeds=self._model.embed(ids, embeds), past_key_values=cache, use_cache=True
        )
        logits = self._logits(output.last_hidden_state[:, -1])
        rows = []
        for choice in choices:
            generator = None
            if job.sampling.temperature > 0:
                generator = torch.Generator(device=device)
                seed = job.sampling.seed
                generator.manual_seed(seed + choice) if seed is not None else generator.seed()
            rows.append(_Row(job, choice, generator))
        keep = [row for row in rows if self._take(row, logits[0])]
        if not keep:
            return
        if len(keep) > 1:
            output.past_key_values.batch_repeat_interleave(len(keep))
        mask = torch.ones(len(keep), len(job.prompt_ids), dtype=torch.long, device=device)
        self._append(output.past_key_values, mask)
        self._rows += keep

    @torch.inference_mode()
    def step(self) -> None:
        """Generate one token for every row, and drop rows that are finished or cancelled."""
        self._keep([i for i, row in enumerate(self._rows) if not row.job.cancelled.is_set()])
        if not self._rows:
            return
        device = self._loaded.device
        last = torch.tensor([[row.ids[-1]] for row in self._rows], device=device)
        positions = self._mask.sum(dim=1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        output = self._decoder(
            inputs_embeds=self._model.embed(last, None),
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits = self._logits(output.last_hidden_state[:, -1])
        self._keep([i for i, row in enumerate(self._rows) if self._take_or_fail(row, logits[i])])

    def _take_or_fail(self, row: _Row, logits: Tensor) -> bool:
        """Take the next token of a row; an error ends its own request only."""
        if row.job.cancelled.is_set():
            return False
        try:
            return self._take(row, logits)
        except Exception as error:
            logger.exception("a token could not be chosen")
            row.job.cancelled.set()
            row.job.emit(error)
            return False

    def _logits(self, hidden: Tensor) -> Tensor:
        return head_logits(self._model.language_model, hidden).float()

    def _take(self, row: _Row, logits: Tensor) -> bool:
        """Choose the next token of a row and emit its text; return whether the row goes on."""
        sampling = row.job.sampling
        token = _choose(logits, sampling, row.generator)
        if token in self._stop_ids:
            self._emit(row, "stop")
            return False
        row.ids.append(token)
        if sampling.logprobs is not None:
            row.pending.append(self._logprob(logits, token, sampling.logprobs))
        row.text = self._decode(row.ids)
        ends = [at for stop in sampling.stop if (at := row.text.find(stop)) >= 0]
        if ends:
            row.text = row.text[: min(ends)]
            self._emit(row, "stop")
            return False
        if len(row.ids) >= sampling.max_tokens:
            self._emit(row, "length")
            return False
        self._emit(row, None)
        return True

    def _emit(self, row: _Row, reason: FinishReason | None) -> None:
        """Emit the text that cannot change any more, and everything at the end."""
        end = len(row.text)
        if reason is None:
            if row.text.endswith("�"):  # a character whose bytes are not complete yet
                end = max(row.sent, len(row.text.rstrip("�")))
            for stop in row.job.sampling.stop:
                for size in range(min(len(stop) - 1, end), 0, -1):
                    if row.text[:end].endswith(stop[:size]):
                        end = max(row.sent, end - size)
                        break
        text, row.sent = row.text[row.sent : end], max(row.sent, end)
        if reason is None and not text:
            return
        logprobs, row.pending = tuple(row.pending), []
        row.job.emit(Piece(row.choice, text, logprobs, reason, len(row.ids)))

    def _decode(self, ids: list[int]) -> str:
        tokenizer: Any = self._loaded.tokenizer
        return cast(str, tokenizer.decode(ids, skip_special_tokens=True)).lstrip()

    def _logprob(self, logits: Tensor, token: int, count: int) -> TokenLogprob:
        values = torch.log_softmax(logits, dim=-1)
        top = torch.topk(values, min(max(count, 1), len(values)))
        found = [
            (self._token_text(int(index)), float(value))
            for value, index in zip(top.values, top.indices, strict=True)
        ]
        return TokenLogprob(self._token_text(token), float(values[token]), tuple(found[:count]))

    def _token_text(self, token: int) -> str:
        """Return the text of a token within a text: some decoders drop a space at the beginning."""
        tokenizer: Any = self._loaded.tokenizer
        before = tokenizer.decode(self._anchor)
        return cast(str, tokenizer.decode([*self._anchor, token]))[len(before) :]

    def _append(self, cache: Any, mask: Tensor) -> None:
        """Append rows to the cache, padded on the left to equal length."""
        if not self._rows:
            self._cache, self._mask = cache, mask
            return
        old, new = self._mask.shape[1], mask.shape[1]
        length = max(old, new)
        self._mask = torch.cat([_pad(self._mask, length, 1), _pad(mask, length, 1)])
        for mine, other in zip(self._cache.layers, cache.layers, strict=True):
            mine.keys = torch.cat([_pad(mine.keys, length, 2), _pad(other.keys, length, 2)])
            mine.values = torch.cat([_pad(mine.values, length, 2), _pad(other.values, length, 2)])

    def _keep(self, indices: list[int]) -> None:
        """Drop all rows but these, and the positions that are padding in all that are left."""
        if len(indices) == len(self._rows):
            return
        self._rows = [self._rows[index] for index in indices]
        if not self._rows:
            self._cache = None
            return
        rows = torch.tensor(indices, device=self._mask.device)
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
        unused = int(self._mask.any(dim=0).long().argmax())
        if unused:
            self._mask = self._mask[:, unused:]
            for layer in self._cache.layers:
                layer.keys = layer.keys[:, :, unused:].contiguous()
                layer.values = layer.values[:, :, unused:].contiguous()


def _pad(tensor: Tensor, length: int, dim: int) -> Tensor:
    """Return the tensor with zeros in front of dimension `dim`, up to `length`."""
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    if generator is None:
        return int(logits.argmax())
    # The largest logit becomes 0, so that dividing by a small temperature cannot overflow to inf.
    probabilities = torch.softmax((logits - logits.max()) / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered  # probability of more likely tokens
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))
