"""Read data sets of a hub through the `datasets` library, at one commit from start to end of a run.

Without `streaming`, `datasets` keeps an Arrow table on the disk, which is mapped into memory. With
it, the records are written once into tar shards (`hub_shards.py`).
"""

import difflib
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_sft.config.hub_address import HubAddress, is_hub_address
from vlm_sft.config.schema import DataFile, RunConfig
from vlm_sft.data import hub_shards
from vlm_sft.data.record_formats import RawRecord, RawRecords
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.filesystem import user_cache
from vlm_sft.utils.libraries import import_extra, one_line

ROWS_AT_ONCE = 16


def open_hub(file: DataFile) -> RawRecords:
    """Open a data set of the hub; its images are the bytes of the records, or inside tar shards.

    Raises:
        UserError: The address, the hub or the library refuses it; one sentence without the token.
    """
    address = HubAddress.parse(file.path)
    shown = str(address.without_commit())
    if file.streaming:
        folder = shards_folder(_pinned(address))
        if not hub_shards.is_complete(folder):
            stream, total = _load(_pinned(address), streaming=True)
            with _hub_errors(address, "; repeat the command, which goes on where it stopped"):
                hub_shards.write(folder, stream, total, shown)
        return hub_shards.open_folder(folder, shown, file)
    table, total = _load(_pinned(address), streaming=False)
    return RawRecords(total, _rows(table, address, shown), image_root=file.images_start_in())


def pinned(config: RunConfig, stored: RunConfig | None) -> RunConfig:
    """Return a configuration whose data sets of the hub have the commit that they are read at.

    Args:
        config: The configuration of this start.
        stored: That of the run's earlier starts, whose commits are kept: what was pushed since
            does not change a run.

    Raises:
        UserError: The hub does not know a data set or a revision, or does not answer.
    """
    known: dict[HubAddress, HubAddress] = {}
    for file in [] if stored is None else stored.data.files:
        if is_hub_address(file.path):
            found = HubAddress.parse(file.path)
            known[found.without_commit()] = found

    def with_commit(file: DataFile) -> DataFile:
        if not is_hub_address(file.path):
            return file
        address = HubAddress.parse(file.path)
        path = str(known.get(address) or _pinned(address))
        return file.model_copy(update={"path": path})

    files = {
        name: [with_commit(file) for file in getattr(config.data, name)]
        for name in ("train", "eval", "eval_text")
    }
    return config.model_copy(update={"data": config.data.model_copy(update=files)})


def fetch(config: RunConfig) -> None:
    """Bring the data sets of the hub onto this machine, before several ranks read them."""
    for file in config.data.files:
        if is_hub_address(file.path):
            open_hub(file)


def shards_folder(address: HubAddress) -> Path:
    """Return the folder of the shards of an address that says its commit."""
    parts = (address.known_commit, address.config or "default", address.split or "only")
    name = "-".join(str(part).replace("/", "_") for part in parts)
    return user_cache("hub") / address.name.replace("/", "--") / name


# --- the hub


def _pinned(address: HubAddress) -> HubAddress:
    if address.known_commit is not None:
        return address
    return replace(address, commit=_commit_of(address))


@functools.lru_cache(maxsize=256)
def _commit_of(address: HubAddress) -> str:
    """Return the commit that a revision is now; asked once per process."""
    from huggingface_hub import HfApi

    with _hub_errors(address):
        found = HfApi().dataset_info(address.name, revision=address.revision).sha
        if found is None:
            raise ValueError("the hub names no commit")
        return str(found)


def _load(address: HubAddress, *, streaming: bool) -> tuple[Any, int]:
    """Return the data set in Arrow format, and its number of records (0: unknown)."""
    datasets = import_extra("datasets", "datasets")
    name, commit = address.name, address.known_commit
    with _hub_errors(address), _quiet_unless_watched(datasets):
        configs = datasets.get_dataset_config_names(name, revision=commit)
        config = _chosen("config", address.config, configs, address, default="default")
        splits = datasets.get_dataset_split_names(name, config, revision=commit)
        split = _chosen("split", address.split, splits, address)
        found = datasets.load_dataset(
            name, config, split=split, revision=commit, streaming=streaming
        )
        if not streaming:
            return found.with_format("arrow"), len(found)
        sizes = found.info.splits or {}
        total = sizes[split].num_examples if split in sizes else None
        return found.with_format("arrow"), total or 0


def _chosen(
    what: str,
    asked: str | None,
    there: Sequence[str],
    address: HubAddress,
    default: str | None = None,
) -> str:
    """Return the config or split of an address, or the only one of the data set."""
    listed = ", ".join(map(repr, there[:12])) + (" ..." if len(there) > 12 else "")
    shown = address.without_commit()
    if asked is None:
        if len(there) == 1 or default in there:
            return there[0] if len(there) == 1 else str(default)
        example = replace(shown, config=there[0]) if what == "config" else None
        example = example or replace(shown, split=there[0])
        raise UserError(
            f"{shown}: has {len(there)} {what}s ({listed}); name one, e.g. {example}",
            code="hub_dataset",
        )
    if asked not in there:
        near = difflib.get_close_matches(asked, there, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{shown}: no {what} {asked!r}; it has {listed}{hint}", code="hub_dataset")
    return asked


@contextmanager
def _quiet_unless_watched(datasets: Any) -> Iterator[None]:
    """Show the bars of `datasets` on a terminal only."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _rows(table: Any, address: HubAddress, shown: str) -> Iterator[RawRecord | RecordError]:
    batches, index = iter(table.iter(batch_size=ROWS_AT_ONCE)), 0
    while True:
        with _hub_errors(address):
            batch = next(batches, None)
            rows = [] if batch is None else hub_shards.embedded_rows(batch)
        if batch is None:
            return
        for row in rows:
            yield hub_shards.raw_record(row, shown, index)
            index += 1


# --- errors


@contextmanager
def _hub_errors(address: HubAddress, then: str = "") -> Iterator[None]:
    """Turn errors of the hub, the network and `datasets` into one sentence without the token.

    Args:
        address: For the message.
        then: Follows the reason.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if isinstance(error, UserError) or not _is_of_the_hub(error):
            raise
        raise _one_sentence(error, address, then) from None
    except Exception as error:
        raise _one_sentence(error, address, then) from None


def _is_of_the_hub(error: OSError) -> bool:
    """Return whether an OSError is the network's or the hub's, and not that of a full disk."""
    return error.errno is None or isinstance(error, ConnectionError | TimeoutError)


def _one_sentence(error: Exception, address: HubAddress, then: str) -> UserError:
    from huggingface_hub import get_token

    sentence = f"{address.without_commit()}: {_reason(error, address)}{then}"
    token = get_token()
    return UserError(sentence.replace(token, "***") if token else sentence, code="hub_dataset")


def _reason(error: Exception, address: HubAddress) -> str:
    from huggingface_hub import errors

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    names = {kind.__name__ for found in chain for kind in type(found).__mro__}
    text = " ".join(str(found) for found in chain)
    answers = [found for found in chain if isinstance(found, errors.HfHubHTTPError)]
    if "OfflineModeIsEnabled" in names:
        return (
            "HF_HUB_OFFLINE is set, and it is not in the cache; unset it (an address with a commit "
            "after @ needs no hub once it is in the cache)"
        )
    if "GatedRepoError" in names or "gated dataset" in text:
        return (
            "the data set is gated; accept its terms on its page, and set HF_TOKEN to a token of "
            "that account or run `hf auth login`"
        )
    if "RevisionNotFoundError" in names:
        return f"the data set has no revision {address.revision or address.commit!r}"
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return "there is no such data set, or it is private and HF_TOKEN does not give access to it"
    if names & {"EmptyDatasetError", "DataFilesNotFoundError"}:
        return "the data set has no files that `datasets` can read"
    if answers:
        status = answers[0].response.status_code
        refused = "; set HF_TOKEN to a token with access" if status in (401, 403) else ""
        return f"the hub answered HTTP {status}{refused}"
    if names & {"ConnectError", "ConnectionError", "TransportError", "TimeoutError", "gaierror"}:
        return f"the hub did not answer ({type(chain[-1]).__name__}: {one_line(chain[-1])})"
    return f"`datasets` cannot read it: {one_line(error)}"
