"""From a run over TRL's DPOTrainer and back: runs where VLM_SFT_TRL_PYTHON names an interpreter.

VLM_SFT_TRL_PYTHON=trl-env/bin/python pytest -m trl tests/test_after_sft.py
"""

import json
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from tests.test_from_checkpoint import config_of, train
from vlm_sft.export.__main__ import main as export
from vlm_sft.inference.loaded_model import load_checkpoint

ROOT = Path(__file__).parent.parent
DATA = ROOT / "configs" / "tiny" / "data"
convert = runpy.run_path(str(ROOT / "scripts" / "after_sft" / "convert_pairs.py"))["main"]


def write_pairs(path: Path) -> None:
    """Prefer the color in capitals to the answer that the run was trained with."""
    lines = []
    for record in json.loads((DATA / "instructions.json").read_text()):
        question, answer = record["conversations"][:2]
        pair = {"id": record["id"], "image": record["image"], "conversations": [question]}
        pair |= {"chosen": answer["value"].upper(), "rejected": answer["value"]}
        lines.append(json.dumps(pair) + "\n")
    path.write_text("".join(lines))


def test_every_pair_of_a_file_is_converted_or_none(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    out = tmp_path / "trl.jsonl"
    assert convert([str(tmp_path / "pairs.jsonl"), str(out), str(DATA)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 24 and all(Path(row["images"][0]).is_file() for row in rows)
    out.unlink()
    with pytest.raises(Exception, match="no such image"):
        convert([str(tmp_path / "pairs.jsonl"), str(out)])
    assert not out.exists()


@pytest.mark.trl
@pytest.mark.slow
@pytest.mark.skipif(
    "VLM_SFT_TRL_PYTHON" not in os.environ,
    reason="VLM_SFT_TRL_PYTHON does not name an interpreter with TRL (docs/after-sft.md)",
)
@pytest.mark.parametrize(
    "options", [["--learning-rate", "3e-3"], ["--lora", "8", "--learning-rate", "1e-2"]]
)
def test_a_run_is_tuned_on_pairs_by_trl_and_trained_further(
    options: list[str], full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    exported, pairs, tuned = tmp_path / "exported", tmp_path / "trl.jsonl", tmp_path / "tuned"
    write_pairs(tmp_path / "pairs.jsonl")
    assert convert([str(tmp_path / "pairs.jsonl"), str(pairs), str(DATA)]) == 0
    assert export([str(full_run), str(exported)]) == 0
    finished = subprocess.run(
        [
            os.environ["VLM_SFT_TRL_PYTHON"],
            str(ROOT / "scripts" / "after_sft" / "dpo.py"),
            *map(str, (exported, pairs, tuned)),
            *("--steps", "60", "--sft-weight", "1", *options),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    print(finished.stdout)
    losses = [float(text) for text in re.findall(r"loss (\d+\.\d+)", finished.stdout)]
    margins = [float(text) for text in re.findall(r"margin ([+-]\d+\.\d+)", finished.stdout)]
    assert margins[0] == pytest.approx(0, abs=1e-3)  # the reference is the model itself
    assert losses[-1] < losses[0] - 1 and margins[-1] > 1

    image = DATA / "images" / "red-circle-0.png"
    before = load_checkpoint(exported).generate("Which colour?", [image], max_new_tokens=8)
    answer = load_checkpoint(tuned).generate("Which colour?", [image], max_new_tokens=8)
    print("before:", before, "after:", answer)
    assert answer != before
    if "--lora" not in options:  # adapters of rank 8 learn the margin here, not the words
        assert answer.isupper() and not before.isupper()
    slow = ["train.max_steps=2", "optim.learning_rate.language_model=1e-6"]
    slow.append("optim.learning_rate.projector=1e-6")
    assert train(config_of(tuned, tmp_path / "run"), *slow) == 0
    further = load_checkpoint(tmp_path / "run" / "final")
    assert further.generate("Which colour?", [image], max_new_tokens=8) == answer
