"""Copy the example configurations, which the documentation names by `configs/...`."""

import os
import shutil
from pathlib import Path

import vlm_sft
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo


def copy_examples(target: Path) -> int:
    """Copy the recipes and the tiny example with its images to `target`; return 0.

    The commands of the documentation work in the folder above `target` afterwards.

    Raises:
        UserError: `target` exists.
    """
    if os.path.lexists(target):
        raise UserError(
            f"--examples: {target.absolute()} exists; run this in another folder, or move it away"
        )
    shutil.copytree(examples_folder(), target, ignore=shutil.ignore_patterns("__pycache__"))
    count = sum(1 for _ in target.rglob("*.yaml"))
    echo(f"{count} example configurations are in {target}; each begins with its command, e.g.")
    echo(f"  vlm-sft stage1 {target}/tiny/stage1.yaml")
    return 0


def examples_folder() -> Path:
    """Return the folder of the examples: in the installed package, or in a checkout."""
    package = Path(vlm_sft.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
