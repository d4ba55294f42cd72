"""Runs and checkpoints of an earlier version are resumed and loaded, or refused in one sentence.

`tests/golden/earlier_run` is a stage-1 run that stopped after 2 of 4 steps, written by the version
whose settings were called `data.recipe`, `train.share_prefixes` and so on.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_runs import ROOT, TINY, rows, run
from tests.train.tiny import reset_accelerate
from vlm_sft.checkpoint.digests import template_digest
from vlm_sft.checkpoint.earlier_versions import identity
from vlm_sft.checkpoint.format import hash_files, read_manifest, verify, with_checksum
from vlm_sft.checkpoint.tensor_files import load_tensors
from vlm_sft.config.schema import load_config, load_stored_config
from vlm_sft.errors import CheckpointError, ConfigError, UserError
from vlm_sft.inference.loaded_model import load_checkpoint
from vlm_sft.utils.ownership import MANIFEST

EARLIER = ROOT / "tests" / "golden" / "earlier_run"
STEP = "checkpoints/step-00000002"
SETTINGS = (
    "data.llava_quirks=llava-1.5",
    "train.micro_batch_size=null",
    "train.packing.max_tokens=600",
    "train.share_image_prefix=true",
    "train.on_nonfinite_loss=skip",
    "data.eval=[]",
    "train.eval_samples=0",
    "train.eval_every_steps=null",
)
"""The settings of the earlier run, under their new names."""

LOSSES = {3: 5.477685016134511, 4: 5.468517756057998}
"""What the earlier version went on to, by step."""


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="module")
def frozen_here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The digests of the tiny model's frozen parts on this machine.

    They are over every bit of random weights, whose last bits may depend on the CPU.
    """
    out = tmp_path_factory.mktemp("frozen") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert run("stage1", out, *SETTINGS, "train.max_steps=1") == 0
    frozen: dict[str, Any] = read_manifest(out / "final")["frozen"]
    return frozen


@pytest.fixture
def earlier(tmp_path: Path, frozen_here: dict[str, Any]) -> Path:
    """A copy of the earlier run."""
    out = tmp_path / "run"
    shutil.copytree(EARLIER, out)
    change_manifest(out / STEP, frozen=frozen_here)
    return out


def change_manifest(folder: Path, **fields: Any) -> None:
    manifest = {**read_manifest(folder), **fields}
    (folder / MANIFEST).write_text(with_checksum(manifest), encoding="utf-8")


def test_a_run_of_an_earlier_version_is_resumed_to_the_same_losses(earlier: Path) -> None:
    assert run("stage1", earlier, *SETTINGS) == 0
    assert verify(earlier / "final").step == 4
    losses = {row["step"]: row["loss"] for row in rows(earlier / "metrics.jsonl")}
    assert {step: losses[step] for step in LOSSES} == pytest.approx(LOSSES, rel=1e-6)
    assert load_config(earlier / "config.yaml").data.llava_quirks == "llava-1.5"
    earlier_rows = (EARLIER / "trained.jsonl").read_text().splitlines()
    assert (earlier / "trained.jsonl").read_text().splitlines() == earlier_rows


def test_a_checkpoint_of_an_earlier_version_answers(earlier: Path) -> None:
    loaded = load_checkpoint(earlier / STEP, device="cpu")
    image = TINY / "data" / "images" / "red-circle-1.png"
    answer = loaded.generate("Describe it.", [image], max_new_tokens=3)
    assert isinstance(answer, str)
    saved = load_tensors(earlier / STEP / "projector.safetensors")
    live = loaded.model.multi_modal_projector.state_dict()
    assert all(torch.equal(live[name], tensor) for name, tensor in saved.items())


def test_a_stored_configuration_has_the_new_names_and_the_old_values() -> None:
    config = load_stored_config(EARLIER / STEP / "config.yaml")
    assert config.data.llava_quirks == "llava-1.5"
    assert config.train.share_image_prefix is True
    assert config.train.on_nonfinite_loss == "skip"
    assert config.train.async_checkpointing is False
    assert config.train.keep_last_checkpoints == 3


def test_another_setting_than_that_of_the_earlier_run_is_named_by_its_new_name(
    earlier: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"data\.llava_quirks cannot change within a run"):
        run("stage1", earlier, *SETTINGS, "data.llava_quirks=none")


def test_an_earlier_configuration_given_by_the_user_is_refused_with_the_new_names() -> None:
    with pytest.raises(UserError, match=r"'data\.recipe' was renamed") as caught:
        load_config(EARLIER / "config.yaml")
    assert "train.share_image_prefix" in str(caught.value) and "\n" not in str(caught.value)


def test_an_earlier_checkpoint_of_another_template_is_refused(earlier: Path) -> None:
    path = earlier / STEP / "template.json"
    template = json.loads(path.read_text())
    template["template"]["file"]["assistant"]["suffix"] = "!"
    path.write_text(json.dumps(template))
    files = hash_files(earlier / STEP)
    files.pop(MANIFEST)
    change_manifest(earlier / STEP, files=files)
    with pytest.raises(CheckpointError, match="the chat template has changed"):
        run("stage1", earlier, *SETTINGS)


def test_quirks_are_compared_by_name_and_not_by_their_sentences() -> None:
    then = read_manifest(EARLIER / STEP)["recipe"]
    assert "picture_first" in then["repeated"]
    now = {
        "name": "llava-1.5",
        "repeated": {"caption_newline": "a", "image_first": "b", "space_behind_image": "c"},
    }
    assert identity("recipe", then) == identity("recipe", now)
    for other in (
        {**now, "name": "fixed"},
        {**now, "repeated": {"caption_newline": "a", "image_first": "b"}},
    ):
        assert identity("recipe", then) != identity("recipe", other)


def test_a_template_is_compared_without_its_description() -> None:
    described = json.loads((EARLIER / STEP / "template.json").read_text())
    digest = template_digest(described)
    described["template"]["file"]["description"] = "other words"
    assert template_digest(described) == digest
    described["template"]["file"]["begin"] = ""
    assert template_digest(described) != digest
