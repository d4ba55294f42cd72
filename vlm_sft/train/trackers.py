"""Experiment trackers (TensorBoard, wandb, trackio), started through accelerate."""

import errno
import importlib.util
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vlm_sft.config.schema import RunConfig
from vlm_sft.errors import UserError, code_of
from vlm_sft.utils.atomic_files import write_bytes
from vlm_sft.utils.filesystem import require_writable
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.reading import read_text


def require_trackers(names: Sequence[str]) -> None:
    """Check that the packages of the trackers are installed.

    Raises:
        UserError: One is not; the message has the command that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers: {name} is not installed; run `pip install {name}` or take it "
                "off the list"
            )


def tracking_folder(config: RunConfig) -> Path:
    """Return the directory that trackers write to."""
    folder = config.train.tracking.dir
    return Path(config.output_dir) / "trackers" if folder is None else Path(folder).expanduser()


def require_tracking_folder(config: RunConfig) -> None:
    """Check that the trackers, if any, can write to their directory.

    Raises:
        UserError: It is a file, or does not accept new files.
    """
    folder = tracking_folder(config)
    if not config.train.trackers:
        return
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is not a directory", str(folder))
        require_writable(folder)
    except OSError as error:
        raise UserError(
            f"train.tracking.dir: {folder} cannot be written ({error.strerror or error}); give "
            "another directory, or set train.trackers to []",
            code=code_of(error).name,
        ) from None


def tracker_arguments(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the arguments that each tracker is started with, besides the project.

    The run's id is kept in its folder, so that a resumed run continues the same wandb run.
    """
    tracking, trackers = config.train.tracking, config.train.trackers
    name = tracking.name or Path(config.output_dir).absolute().name
    arguments: dict[str, dict[str, Any]] = {}
    if "wandb" in trackers:
        arguments["wandb"] = {
            "name": name,
            "entity": tracking.entity,
            "dir": str(tracking_folder(config)),
            "id": _tracking_id(Path(config.output_dir)),
            "resume": "allow",
        }
    if "trackio" in trackers:
        # trackio knows runs by name alone.
        unique = f"{name}-{_tracking_id(Path(config.output_dir))}"
        arguments["trackio"] = {"name": tracking.name or unique, "resume": "allow"}
    return arguments


def _tracking_id(output_dir: Path) -> str:
    """Return the id of the tracked run, which is created at the first start."""
    path = output_dir / "trackers" / "run_id"
    try:
        found = read_text(path, limit=1024).strip()
    except FileNotFoundError:
        found = secrets.token_hex(4)
        write_bytes(path, f"{found}\n".encode())
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found) is None:
        raise UserError(f"{path}: expected the id of the tracked run; delete the file for a new id")
    return found


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Start the trackers that `accelerator` was created with, with the run's configuration."""
    if accelerator.log_with:
        arguments: dict[str, dict[str, Any]] = {}
        if accelerator.is_main_process:
            tracking_folder(config).mkdir(parents=True, exist_ok=True)
            arguments = tracker_arguments(config)
            os.environ.setdefault("TRACKIO_DIR", str(tracking_folder(config).absolute()))
        with library_call("accelerate", "train.trackers", "start the trackers"):
            accelerator.init_trackers(
                config.train.tracking.project,
                config=flat(config.model_dump(mode="json")),
                init_kwargs=arguments,
            )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted keys with text or numbers, which every tracker accepts."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, (int, float, bool)) else str(value)
    return result


def tracker_values(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row as `train/...` or `eval/...`, for `Accelerator.log`."""
    kind = "train" if row.keys().isdisjoint(("eval_loss", "eval_suite")) else "eval"
    numbers = {k: v for k, v in flat(row).items() if isinstance(v, (int, float)) and k != "step"}
    named = {key.removeprefix("eval_suite."): value for key, value in numbers.items()}
    return {f"{kind}/{key}": float(value) for key, value in named.items()}
