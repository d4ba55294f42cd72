"""Experiment trackers (TensorBoard, wandb, trackio, MLflow), started through accelerate."""

import errno
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from vlm_sft.config.schema import RunConfig
from vlm_sft.errors import UserError, code_of
from vlm_sft.utils.atomic_files import write_bytes
from vlm_sft.utils.filesystem import require_writable
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.reading import read_text

logger = logging.getLogger(__name__)


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


def tracker_arguments(config: RunConfig, *, first_step: int = 0) -> dict[str, dict[str, Any]]:
    """Return the arguments that each tracker is started with, besides the project.

    The ids of the tracked runs are kept in the run's folder, so that a resumed run continues them.

    Args:
        config: The run's configuration.
        first_step: The step that the run resumes from.

    Raises:
        UserError: A file with an id was damaged.
    """
    tracking, trackers = config.train.tracking, config.train.trackers
    output_dir = Path(config.output_dir)
    name = tracking.name or output_dir.absolute().name
    arguments: dict[str, dict[str, Any]] = {}
    if "tensorboard" in trackers and first_step:
        # A killed run may have logged later steps, which are trained again.
        arguments["tensorboard"] = {"purge_step": first_step + 1}
    if "wandb" in trackers:
        arguments["wandb"] = {
            "name": name,
            "entity": tracking.entity,
            "group": tracking.group,
            "tags": tracking.tags or None,
            "dir": str(tracking_folder(config)),
            "id": _tracking_id(output_dir),
            "resume": "allow",
        }
    if "trackio" in trackers:
        # trackio knows runs by name alone.
        unique = f"{name}-{_tracking_id(output_dir)}"
        arguments["trackio"] = {
            "name": tracking.name or unique,
            "group": tracking.group,
            "resume": "allow",
        }
    if "mlflow" in trackers:
        arguments["mlflow"] = _mlflow_arguments(config, name)
    return arguments


def _mlflow_arguments(config: RunConfig, name: str) -> dict[str, Any]:
    tracking = config.train.tracking
    tags = dict.fromkeys(tracking.tags, "true")
    if tracking.group is not None:
        tags["group"] = tracking.group
    arguments: dict[str, Any] = {"run_name": name, "tags": tags}
    if (found := _stored_id(_mlflow_id_file(config))) is not None:
        arguments["run_id"] = found
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        arguments["logging_dir"] = (tracking_folder(config).absolute() / "mlflow").as_uri()
    return arguments


def _tracking_id(output_dir: Path) -> str:
    """Return the id of the tracked run, which is created at the first start."""
    path = output_dir / "trackers" / "run_id"
    found = _stored_id(path)
    if found is None:
        found = secrets.token_hex(4)
        write_bytes(path, f"{found}\n".encode())
    return found


def _stored_id(path: Path) -> str | None:
    try:
        found = read_text(path, limit=1024).strip()
    except FileNotFoundError:
        return None
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found) is None:
        raise UserError(f"{path}: expected the id of the tracked run; delete the file for a new id")
    return found


def _mlflow_id_file(config: RunConfig) -> Path:
    return Path(config.output_dir) / "trackers" / "mlflow_run_id"


def start_trackers(accelerator: Accelerator, config: RunConfig, *, first_step: int) -> None:
    """Start the trackers that `accelerator` was created with, with the run's configuration.

    Args:
        accelerator: Ranks and names of the trackers.
        config: The run's configuration.
        first_step: The step that the run resumes from.

    Raises:
        UserError: A tracker cannot be started.
    """
    if not accelerator.log_with:
        return
    arguments: dict[str, dict[str, Any]] = {}
    if accelerator.is_main_process:
        folder = tracking_folder(config).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        arguments = tracker_arguments(config, first_step=first_step)
        os.environ.setdefault("TRACKIO_DIR", str(folder))
        if "mlflow" in arguments and not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    with library_call("accelerate", "train.trackers", "start the trackers"):
        accelerator.init_trackers(config.train.tracking.project, init_kwargs=arguments)
        if accelerator.is_main_process:
            settings = flat(config.model_dump(mode="json"))
            for tracker in accelerator.trackers:
                is_resumed = "run_id" in arguments.get(tracker.name, {})
                _store_settings(tracker, config, settings, is_resumed=is_resumed)


def _store_settings(
    tracker: Any, config: RunConfig, settings: Mapping[str, Any], *, is_resumed: bool
) -> None:
    """Store the settings; MLflow keeps those of the first start, since it lets none change."""
    if tracker.name != "mlflow":
        tracker.store_init_configuration(settings)
    elif is_resumed:
        logger.info("mlflow: the run is continued; its parameters are those of the first start")
    else:
        tracker.store_init_configuration(settings)
        path = _mlflow_id_file(config)
        write_bytes(path, f"{tracker.tracker.info.run_id}\n".encode())


class AnswerTracker:
    """Logs the answers that are generated at evaluations, with their images, to the trackers.

    TensorBoard and MLflow get each image once, wandb and trackio a table at each evaluation.

    Args:
        accelerator: Its trackers; of rank 0.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._images_logged: set[str] = set()

    def log(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log rows of `id`, `question`, `answer`, `expected`, and `images` as JPEG files."""
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                self._log_to_tensorboard(tracker.tracker, rows, step)
            elif tracker.name == "mlflow":
                self._log_to_mlflow(rows, step)
            else:
                self._log_table(import_module(tracker.name), tracker, rows, step)
        self._images_logged |= {str(row["id"]) for row in rows}

    def _log_to_tensorboard(
        self, writer: Any, rows: Sequence[Mapping[str, Any]], step: int
    ) -> None:
        for row in rows:
            name = str(row["id"])
            writer.add_text(f"answers/{name}", _as_markdown(row), global_step=step)
            if name not in self._images_logged:
                for number, image in enumerate(_opened(row)):
                    pixels = np.asarray(image)
                    tag = f"images/{name}/{number}"
                    writer.add_image(tag, pixels, global_step=step, dataformats="HWC")
        writer.flush()

    def _log_to_mlflow(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        mlflow = import_module("mlflow")
        text = "\n\n".join(f"## {row['id']}\n\n{_as_markdown(row)}" for row in rows)
        mlflow.log_text(text + "\n", f"answers/step-{step:08d}.md")
        for position, row in enumerate(rows):
            if str(row["id"]) not in self._images_logged:
                for number, image in enumerate(_opened(row)):
                    mlflow.log_image(image, f"images/{position}-{number}.png")

    @staticmethod
    def _log_table(
        library: Any, tracker: Any, rows: Sequence[Mapping[str, Any]], step: int
    ) -> None:
        columns = ["id", "image", "question", "label", "answer"]
        data = [
            [
                str(row["id"]),
                next((library.Image(image) for image in _opened(row)), None),
                *(str(row[key]) for key in ("question", "expected", "answer")),
            ]
            for row in rows
        ]
        tracker.log({"answers": library.Table(columns=columns, data=data)}, step=step)


def _opened(row: Mapping[str, Any]) -> Iterator[Image.Image]:
    return (Image.open(BytesIO(data)).convert("RGB") for data in row.get("images", ()))


def _as_markdown(row: Mapping[str, Any]) -> str:
    """Return question, label and answer as indented blocks, which Markdown leaves as they are."""
    return "\n\n".join(
        f"**{title}**\n\n" + indent(str(row[key]).strip() or "(no text)", "    ")
        for title, key in (("question", "question"), ("label", "expected"), ("answer", "answer"))
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
    evaluated = not row.keys().isdisjoint(("eval_loss", "eval_suite", "text_loss"))
    kind = "eval" if evaluated else "train"
    numbers = {k: v for k, v in flat(row).items() if isinstance(v, (int, float)) and k != "step"}
    named = {key.removeprefix("eval_suite."): value for key, value in numbers.items()}
    return {f"{kind}/{key}": float(value) for key, value in named.items()}
