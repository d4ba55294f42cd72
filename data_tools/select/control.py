"""Train on the selected and on the random records, and compare the two models."""

import hashlib
import json
from pathlib import Path
from typing import Any

from vlm_sft.commands.parser import require_file, require_folder
from vlm_sft.commands.run_module import run_module
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import write_owned
from vlm_sft.utils.reading import read_json

PARTS = ("random", "selected")


def require_control(train: Path, suite: Path) -> None:
    """Read the configuration and the suite with its questions, before anything is computed.

    Args:
        train: Configuration of stage 2; its `data.train` is replaced later.
        suite: Suite that both models are evaluated on.

    Raises:
        UserError: One of them, or a file that it names, cannot be used.
    """
    from vlm_sft.commands.inputs import ALL_PARTS, read_config
    from vlm_sft.config.method import require_stage2
    from vlm_sft.evaluation.suites.config import load_suite
    from vlm_sft.evaluation.suites.tasks import read_task

    require_stage2(read_config(str(train), [], ALL_PARTS - {"train"}))
    held_out = load_suite(suite)
    for path in held_out.input_paths():
        require_file(f"{suite}: files:", path)
    for folder in held_out.image_roots():
        require_folder(f"{suite}: images:", folder)
    for task in held_out.tasks:
        read_task(task, seed=held_out.seed)


def train_control(folder: Path, image_root: Path, train: Path, suite: Path) -> dict[str, Any]:
    """Return the scores of the model of the selected records minus those of the random ones.

    Both are trained by the same configuration, with the same number of steps. A repeated call goes
    on where the last one was. A run is named by its records, its configuration and the suite, so
    that several selections in one folder have runs of their own, and share that of the random part.

    Args:
        folder: The directory of the selection.
        image_root: Where the image names of its records start.
        train: Configuration of stage 2; its `data.train` and `output_dir` are replaced.
        suite: Suite that both models are evaluated on.

    Raises:
        UserError: A training or an evaluation fails, or the numbers of steps differ.
    """
    from vlm_sft.evaluation.suites.compare import compare_results, read_results

    steps, results = {}, {}
    for part in PARTS:
        records = folder / f"{part}.jsonl"
        name = hashlib.sha256()
        for path in (records, train, suite):
            name.update(hashlib.sha256(path.read_bytes()).digest())
        run = folder / "control" / f"{part}-{name.hexdigest()[:12]}"
        data = [{"path": str(_kept(records, run)), "image_root": str(image_root)}]
        echo(f"control: training on {records}")
        settings = [f"data.train={json.dumps(data)}", f"output_dir={run}"]
        run_module("vlm_sft.stage2", [str(train), *settings])
        out = run.with_name(f"{run.name}-evaluation")
        run_module("vlm_sft.evaluate", [str(run / "final"), str(suite), "--out", str(out)])
        steps[part] = read_json(run / "final" / "manifest.json")["step"]
        results[part] = read_results(out)
    if len(set(steps.values())) > 1:
        raise UserError(
            f"{folder / 'control'}: the two runs had different numbers of steps ({steps}), so they "
            f"cannot be compared; set train.max_steps in {train}"
        )
    compared = compare_results(results["random"], results["selected"])
    return {"steps": steps["selected"], **compared}


def _kept(records: Path, run: Path) -> Path:
    """Copy records beside their run, where no later selection replaces them."""
    path = run.with_suffix(".jsonl")
    write_owned(path, records.read_bytes())
    return path
