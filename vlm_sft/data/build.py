"""Build tokenizer, records, sampler and batches from a run's configuration."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vlm_sft.config.finished import read_finished
from vlm_sft.config.schema import DataFile, RunConfig
from vlm_sft.data.batch import Collator, LoadError, PackedCollator, PaddedCollator
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.finished_template import finished_chat_tokenizer
from vlm_sft.data.hf_tokenizer import load_tokenizer
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.data.image_size_cache import CachedImageSizes
from vlm_sft.data.images import ImageSpec
from vlm_sft.data.ledger import Ledger
from vlm_sft.data.packing import PackingStats, RecordLengths, packing_stats
from vlm_sft.data.sampler import StepSampler
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.data.tokenize_cache import CachedChatTokenizer
from vlm_sft.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Training and held-out records with the account of what became of each.

    Attributes:
        train: Records to train on.
        train_ledger: Account of the records of their files.
        eval: Held-out records; None without any.
        eval_ledger: The same account of those.
        text: Held-out conversations without images; None without any.
        text_ledger: The same account of those.
    """

    train: SupervisedDataset
    train_ledger: Ledger
    eval: SupervisedDataset | None
    eval_ledger: Ledger | None
    text: SupervisedDataset | None = None
    text_ledger: Ledger | None = None

    @property
    def ledgers(self) -> dict[str, Ledger]:
        """The ledgers by the name of their file in the run directory."""
        found = {
            "ledger.jsonl": self.train_ledger,
            "ledger_eval.jsonl": self.eval_ledger,
            "ledger_text.jsonl": self.text_ledger,
        }
        return {name: ledger for name, ledger in found.items() if ledger is not None}

    def write_ledgers(self, output_dir: Path) -> None:
        """Write the ledger of each set of records."""
        for name, ledger in self.ledgers.items():
            ledger.write(output_dir / name)

    def quarantine(self, error: LoadError, output_dir: Path, *, held_out: bool) -> None:
        """Account for a record that turned out broken on the way."""
        dataset = self.eval if held_out else self.train
        assert dataset is not None
        if dataset.quarantine(error.index, error.reason, error.message):
            self.write_ledgers(output_dir)
            logger.info("quarantined: %s", error.message)

    def summary(self) -> str:
        """A line for each ledger."""
        lines = [f"train: {self.train_ledger.summary()}"]
        if self.eval_ledger is not None:
            lines.append(f"validation: {self.eval_ledger.summary()}")
        if self.text_ledger is not None:
            lines.append(f"held-out text: {self.text_ledger.summary()}")
        return "\n".join(lines)


def load_chat_tokenizer(config: RunConfig) -> ChatTokenizer:
    """Load the language model's tokenizer and the chat template.

    Raises:
        UserError: The tokenizer or the template cannot be loaded, or they do not work together.
    """
    data, finished = config.data, config.model.from_checkpoint
    tokenizer = load_tokenizer(config.model.language_model)
    if finished is not None and data.template == "auto":
        return finished_chat_tokenizer(read_finished(finished), tokenizer, data)
    return ChatTokenizer.from_name(
        data.template,
        tokenizer,
        default_system=data.system,
        llava_quirks=data.llava_quirks,
        image_separator=data.image_separator,
    )


def load_data(
    config: RunConfig, chat_tokenizer: ChatTokenizer, image_spec: ImageSpec, layout_rule: LayoutRule
) -> Data:
    """Read and tokenize all records, or find them in `data.cache_dir`; see `SupervisedDataset`.

    Args:
        config: The run's configuration.
        chat_tokenizer: Tokenizes conversations.
        image_spec: How the vision tower takes images.
        layout_rule: Gives crops and tokens of every image.

    Raises:
        UserError: A file cannot be read, or no record can be used.
        RecordError: A record cannot be used and `data.on_error` is `stop`.
    """
    cache = config.data.cache_dir
    cached = chat_tokenizer if cache is None else CachedChatTokenizer(chat_tokenizer, cache)
    sizes = None if cache is None or not layout_rule.needs_sizes else CachedImageSizes(cache)

    def load(
        files: list[DataFile], *, held_out: bool = True
    ) -> tuple[SupervisedDataset | None, Ledger | None]:
        if not files:
            return None, None
        ledger = Ledger(held_out=held_out)
        dataset = SupervisedDataset(
            files,
            cached,
            image_spec,
            layout_rule=layout_rule,
            config=config.data,
            ledger=ledger,
            size_of=None if sizes is None else sizes.size_of,
        )
        if sizes is not None:
            sizes.flush()
        return dataset, ledger

    train, train_ledger = load(config.data.train, held_out=False)
    assert train is not None and train_ledger is not None  # data.train is never empty
    data = Data(train, train_ledger, *load(config.data.eval), *load(config.data.eval_text))
    require_text_alone(data.text)
    return data


def require_text_alone(text: SupervisedDataset | None) -> None:
    """Check that the records of `data.eval_text` have no images.

    Raises:
        UserError: One has.
    """
    if text is not None and any(text.has_image):
        record = text.record_ids[list(text.has_image).index(True)]
        raise UserError(
            f"data.eval_text: record {record!r} has an image, expected text alone; put records "
            "with images in data.eval"
        )


class Ordered(RecordLengths, Protocol):
    """What the order of a run's records hangs on."""

    @property
    def weights(self) -> Sequence[float]:
        """How often each record is seen in an epoch."""
        ...

    @property
    def has_image(self) -> Sequence[bool]: ...


def make_sampler(config: RunConfig, train: Ordered) -> StepSampler:
    """The order of the run's records."""
    by_length = config.train.group_by_length
    return StepSampler(
        train.weights,
        batch_size=config.train.global_batch_size,
        seed=config.seed,
        lengths=train.lengths if by_length else None,
        has_image=train.has_image if by_length else None,
        prefix_ids=train.prefix_ids if config.train.share_image_prefix else None,
    )


def num_steps(config: RunConfig, sampler: StepSampler) -> int:
    """Return the number of optimizer steps of a run."""
    steps = sampler.total_steps(config.train.epochs)
    return steps if config.train.max_steps is None else min(steps, config.train.max_steps)


def make_collator(config: RunConfig, pad_token_id: int, image_cost: float) -> Collator:
    """Build the padded or packed collator that the configuration asks for.

    Args:
        config: The run.
        pad_token_id: Fills up.
        image_cost: What encoding a crop of an image costs, in tokens; see `image_cost`.
    """
    packing = config.train.packing
    if packing is None:
        assert config.train.micro_batch_size is not None
        return PaddedCollator(config.train.micro_batch_size, pad_token_id)
    return PackedCollator(
        max_tokens=packing.max_tokens,
        share_image_prefix=config.train.share_image_prefix,
        round_to=packing.round_to,
        image_cost=0.0 if config.data.feature_cache else image_cost,
        pad_token_id=pad_token_id,
    )


MAX_SAMPLED_STEPS = 50


def sampled_steps(total: int) -> list[int]:
    """Return up to `MAX_SAMPLED_STEPS` steps spread evenly over a run."""
    count = min(MAX_SAMPLED_STEPS, total)
    return [i * total // count for i in range(count)]


def sampled_packing_stats(
    collator: Collator,
    sampler: StepSampler,
    train: RecordLengths,
    *,
    num_steps: int,
    world_size: int,
) -> PackingStats | None:
    """Return how well the packed rows of a run are filled; None without packing.

    Args:
        collator: Padded or packed.
        sampler: The records of each step.
        train: Lengths of all records.
        num_steps: Steps of the run, of which a few are measured.
        world_size: Number of ranks.
    """
    if not isinstance(collator, PackedCollator):
        return None
    steps = [
        collator.assign_to_ranks(train, sampler.step_indices(step), world_size)
        for step in sampled_steps(num_steps)
    ]
    return packing_stats(
        steps, train, max_tokens=collator.max_tokens, share_image_prefix=collator.share_image_prefix
    )
