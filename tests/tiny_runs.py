"""Runs of the tiny configurations in this process."""

import json
from pathlib import Path
from typing import Any

from tests.train.tiny import reset_accelerate
from vlm_sft import stage1, stage2

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny"
FAST = ["train.trackers=[]", "train.save_every_steps=2", "train.max_steps=4"]


def run(stage: str, out: Path, *overrides: str, config: str = "") -> int:
    """Train with a stage's main, from the repository's folder; its exit code."""
    reset_accelerate()
    path = TINY / f"{config or stage}.yaml"
    main = {"stage1": stage1.main, "stage2": stage2.main}[stage]
    return main([str(path), f"output_dir={out}", *FAST, *overrides])


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
