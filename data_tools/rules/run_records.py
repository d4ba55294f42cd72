"""Read from the folder of a run which training records it has used, and where they are."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.trained_images import TrainingRecords
from vlm_sft.config.schema import RunConfig, load_stored_config
from vlm_sft.errors import UserError
from vlm_sft.utils.reading import open_regular

_LOG = "trained.jsonl"


def used_records(run: Path) -> TrainingRecords:
    """Return the training files of a run, with the ids of the records that its updates have used.

    Records of steps whose update was skipped changed no weight and do not count. Of records with
    one id, all count if one was used.

    Raises:
        UserError: The folder is not that of a run, the run made no update, or its log is damaged.
    """
    config, path = _config(run), run / _LOG
    if not path.is_file():
        raise UserError(
            f"--run {run}: no {_LOG} there, which lists the records of every step; give the "
            "output_dir of a run that has started, or its records as --training",
            code="data_file_missing",
        )
    used: set[str] = set()
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # a killed run leaves a part of a line, for a step that it repeats
            try:
                row = json.loads(line)
                if "update_left_out" not in row:
                    used.update(map(str, row["records"]))
            except (ValueError, TypeError, KeyError, RecursionError):
                raise UserError(
                    f"{path}:{number}: damaged, so it is not known which records were trained on; "
                    "restore the file, or compare with all records (--training)",
                    code="json_syntax",
                ) from None
    if not used:
        raise UserError(
            f"--run {run}: no update was made, so no record was trained on; give a run that has "
            "made a step",
            code="no_records",
        )
    return TrainingRecords(config.data.train, f"--run {run}", used)


def origins_of(runs: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Yield the runs that began with something trained that is in none of the given runs."""
    given = [run.resolve() for run in runs]
    for run in runs:
        config = _config(run)
        origin = config.start_from or config.projector or config.model.from_checkpoint
        if origin is not None and not any(Path(origin).resolve().is_relative_to(r) for r in given):
            yield run, origin


def _config(run: Path) -> RunConfig:
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"--run {run}: no config.yaml there; give the output_dir of a run of vlm_sft",
            code="data_file_missing",
        )
    return load_stored_config(path)
