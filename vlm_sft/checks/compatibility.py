"""Check that tokenizer, records and model are compatible, in `check` and before training."""

from collections.abc import Iterable, Sequence

from vlm_sft.data.build import Data
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.hf_tokenizer import padding_id
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.positions import position_limit
from vlm_sft.model.vlm import VisionLanguageModel

PROBED_RECORDS = 8
"""Records of each data set in which the special tokens of the template are searched."""


def require_compatible(
    chat_tokenizer: ChatTokenizer, data: Data, model: VisionLanguageModel
) -> list[str]:
    """Refuse what would fail during training; return warnings.

    Raises:
        UserError: An id has no row in the embedding table, a record is longer than the table of
            positions, or no training record has an image.
    """
    require_images(data.train)
    return [*require_rows(chat_tokenizer, model, data), *require_positions(model, data)]


def require_images(train: SupervisedDataset) -> None:
    """Refuse data without images, on which the projector would not be trained.

    Raises:
        UserError: No training record has an image.
    """
    if not any(train.has_image):
        raise UserError(
            "data.train: no record has an image, so the projector would not be trained; add "
            "records with images",
            code="nothing_learns",
        )


def require_rows(
    chat_tokenizer: ChatTokenizer, model: VisionLanguageModel, data: Data
) -> list[str]:
    """Refuse a tokenizer whose ids go beyond the model's embedding table or output head.

    Special tokens that neither the template nor padding uses never occur; they are only reported.

    Raises:
        UserError: An id that is used has no row; the message names some of them.
    """
    tokenizer = chat_tokenizer.tokenizer
    pad_token_id = padding_id(tokenizer)
    rows = _num_rows(model)
    name_of = {index: name for name, index in tokenizer.get_vocab().items()}
    controls = chat_tokenizer.special_token_ids
    used = {
        f"{name_of.get(pad_token_id)!r} for padding": {pad_token_id},
        "end-of-turn tokens": set(chat_tokenizer.eot_token_ids),
        "the template's tokens": _ids_of_records(data) & controls,
        "ordinary tokens": set(name_of) - controls,
        "ids in the records": _ids_of_records(data),
    }
    missing = {what: sorted(i for i in ids if i >= rows) for what, ids in used.items()}
    what, beyond = next(((w, ids) for w, ids in missing.items() if ids), ("", []))
    kind = type(causal_lm(model.language_model)).__name__
    if beyond:
        shown = ", ".join(f"{name_of.get(i, '?')!r} = {i}" for i in beyond[:4])
        raise UserError(
            f"model.language_model.tokenizer: it has ids up to {max(name_of):,}, but "
            f"{kind} has only {rows:,} rows of embeddings (ids 0 to {rows - 1:,}); rows are "
            f"missing for {what} ({shown}{', ...' if len(beyond) > 4 else ''}). Use the tokenizer "
            f"of the model, or a model with a vocab_size of at least {max(name_of) + 1:,}"
        )
    unused = sorted(i for i in name_of if i >= rows)
    if not unused:
        return []
    shown = ", ".join(repr(name_of[i]) for i in unused[:4])
    return [
        f"{len(unused)} special tokens of the tokenizer ({shown}) have no row in the {rows:,} "
        f"embeddings of {kind}; this run does not use them"
    ]


def require_positions(model: VisionLanguageModel, data: Data) -> list[str]:
    """Refuse records longer than a position table; report those longer than the trained context.

    Packed records each start at position 0, so the length of a row does not matter.

    Raises:
        UserError: A record is longer than the position table of the model.
    """
    language_model = causal_lm(model.language_model)
    limit = position_limit(language_model)
    if limit is None:
        return []
    kind, notes = type(language_model).__name__, list[str]()
    named = (("data.train", data.train), ("data.eval", data.eval), ("data.eval_text", data.text))
    for key, dataset in named:
        lengths: Sequence[int] = () if dataset is None else dataset.lengths
        count, longest = sum(n > limit.tokens for n in lengths), max(lengths, default=0)
        if dataset is None or not count:
            continue
        where = (
            f"{key}: {count:,} of {len(lengths):,} records are longer than the {limit.tokens:,} "
            f"positions of {kind} ({limit.key}); the longest, "
            f"{dataset.record_ids[lengths.index(longest)]!r}, has {longest:,} tokens"
        )
        advice = f"set data.max_length to {limit.tokens} and data.length_policy to skip"
        if limit.is_hard:
            raise UserError(
                f"{where}, and the model fails on longer ones; {advice} or drop_turns, or use a "
                "model with more positions",
                code="too_long",
            )
        notes.append(
            f"{where}. The model computes positions beyond that, but was not trained on them; "
            f"{advice} to skip these records"
        )
    return notes


def _num_rows(model: VisionLanguageModel) -> int:
    language_model = causal_lm(model.language_model)
    tables = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    return min(int(table.weight.shape[0]) for table in tables)


def _ids_of_records(data: Data) -> set[int]:
    found: set[int] = set()
    for dataset in (data.train, data.eval, data.text):
        for index in _some(0 if dataset is None else len(dataset)):
            assert dataset is not None
            found.update(i for i in dataset.token_ids(index) if i >= 0)
    return found


def _some(count: int) -> Iterable[int]:
    step = max(1, count // PROBED_RECORDS)
    return range(0, count, step)
