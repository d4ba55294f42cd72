"""A run's folder: one run at a time, one configuration for its whole life."""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm_sft.atomic import write_text
from vlm_sft.config import RunConfig, dump_config, load_config
from vlm_sft.errors import ConfigError, UserError

FREE_TO_CHANGE = frozenset(
    {
        "output_dir",
        "data.num_workers",
        "train.trackers",
        "train.log_every_steps",
        "train.save_every_steps",
        "train.keep_checkpoints",
        "train.eval_samples",
    }
)
"""Keys that change nothing of what is learned, so that a resumed run may have others."""


@contextmanager
def locked(output_dir: Path, *, enabled: bool) -> Iterator[None]:
    """Keep a second run out of the folder while the block lasts; a killed run leaves no lock.

    Raises:
        UserError: Another process has it.
    """
    if not enabled:
        yield
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"output_dir {output_dir} is in use by another run; wait for it or choose another"
            ) from None
        yield


def settle_config(config: RunConfig, *, has_checkpoints: bool) -> None:
    """Write `config.yaml`, after refusing to go on with a run under another configuration.

    Raises:
        ConfigError: The folder's checkpoints were made otherwise; every difference is named.
    """
    path = Path(config.output_dir) / "config.yaml"
    if has_checkpoints and path.exists():
        before, now = _flat(load_config(path)), _flat(config)
        changed = [
            f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in FREE_TO_CHANGE
        ]
        if changed:
            raise ConfigError(
                f"{config.output_dir} holds a run with another configuration ("
                + "; ".join(changed)
                + "); go back to it, or choose another output_dir"
            )
    write_text(path, dump_config(config))


def _flat(config: RunConfig) -> dict[str, Any]:
    return dict(_leaves(config.model_dump(mode="json"), ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
