"""`activation_checkpointing: auto`: measured on a real step, agreed upon, and without a trace."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.tiny_runs import run
from tests.train.tiny import example, reset_accelerate, tiny_model
from vlm_sft.checkpoint.format import read_manifest
from vlm_sft.data.batch import PaddedCollator, pad_examples
from vlm_sft.model.activation_checkpointing import CheckpointPolicy, set_activation_checkpointing
from vlm_sft.train import checkpointing_policy as activations
from vlm_sft.train.checkpointing_policy import Trial, longest_micro_batch, measure
from vlm_sft.train.live_bytes import LimitExceeded, LiveBytes
from vlm_sft.utils import filesystem


def trials_with(free: int, monkeypatch: pytest.MonkeyPatch, later: int = 0) -> tuple[Trial, ...]:
    """What is tried on a machine with so many free bytes."""
    reset_accelerate()
    monkeypatch.setattr(activations, "_free_bytes", lambda device: free)
    accelerator = Accelerator(cpu=True)
    model = tiny_model("projector", "language_model").train()
    batch = pad_examples([example(n, length=50) for n in range(8)], 0)
    return measure(
        lambda: model(batch).loss_sum.backward(),
        lambda policy: set_activation_checkpointing(model, policy),
        model,
        accelerator,
        later_bytes=later,
    )


def test_the_first_policy_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = trials_with(2**40, monkeypatch)
    assert alone.policy == "none" and alone.fits and alone.peak_bytes is not None
    needed = alone.peak_bytes
    tight = trials_with(int(needed * 0.95), monkeypatch)  # runs out in the middle of the step
    assert [trial.policy for trial in tight] == ["none", "selective"]
    assert tight[0].peak_bytes is None and not tight[0].fits
    assert tight[1].fits and (tight[1].peak_bytes or 0) < 0.85 * needed
    margin = trials_with(int(needed * 1.05), monkeypatch)  # done, but into the tenth left aside
    assert [t.policy for t in margin] == ["none", "selective"] and margin[0].peak_bytes == needed


def test_the_state_that_the_optimiser_will_have_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = trials_with(2**40, monkeypatch)
    assert alone.peak_bytes is not None
    (later,) = trials_with(2**40, monkeypatch, later=1000)
    assert later.peak_bytes == alone.peak_bytes + 1000
    room = int(alone.peak_bytes * 1.2)
    assert [t.policy for t in trials_with(room, monkeypatch)] == ["none"]
    assert len(trials_with(room, monkeypatch, later=room // 4)) > 1


def test_where_nothing_fits_the_last_is_taken_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = trials_with(1000, monkeypatch)
    assert [trial.policy for trial in trials] == ["none", "selective", "full"]
    choice = activations.PolicyChoice("full", trials, {"batch": "8 records of up to 54 tokens"})
    assert str(choice) == (
        "activation checkpointing: full (a step of 8 records of up to 54 tokens: none ran out of "
        "0.00 GiB; selective ran out of 0.00 GiB; full ran out of 0.00 GiB); even that may run "
        "out, so lower train.micro_batch_size (or train.packing.max_tokens) or data.max_length"
    )


def test_live_bytes_counts_what_lives_and_no_view_twice() -> None:
    with LiveBytes(limit=10_000) as live:
        kept = torch.zeros(1000)  # 4000 bytes
        assert live.now == 4000
        view = kept[10:].view(-1)
        view.add_(1)
        assert live.now == 4000
        passing = kept + 1
        del passing
        assert (live.now, live.peak) == (4000, 8000)
        with pytest.raises(LimitExceeded):
            torch.zeros(2000)


def test_the_longest_micro_batch_is_the_one_with_most_positions() -> None:
    sizes = SimpleNamespace(lengths=[10, 50, 20, 30, 5, 5, 5])
    steps = [[[0, 1], [2, 3]], [[4, 5, 6]]]

    def positions(indices: Sequence[int]) -> int:
        return PaddedCollator(2, 0).num_tokens(sizes, indices)

    assert longest_micro_batch(steps, positions, world_size=1) == ([0, 1], True)
    assert longest_micro_batch(steps, positions, world_size=2) == ([0, 1], False)


def test_every_process_takes_what_fits_in_all() -> None:
    def reduce(values: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return values + torch.tensor([[0, 0], [theirs, 90]])

    accelerator: Any = SimpleNamespace(
        num_processes=2, process_index=0, device=torch.device("cpu"), reduce=reduce
    )
    theirs = 80
    assert activations._agreed(Trial("none", 70, 100), accelerator) == Trial("none", 80, 90)
    theirs = -1  # the other one ran out
    assert activations._agreed(Trial("none", 70, 100), accelerator) == Trial("none", None, 90)


def test_a_measured_run_is_the_run_that_was_asked_for_by_name(
    in_the_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    fresh = ["projector=null", "train.max_steps=2", "train.eval_samples=0", "data.eval=[]"]
    free = 2**40
    monkeypatch.setattr(activations, "_free_bytes", lambda device: free)
    files = {}
    for name in ("auto", "none"):
        asked = f"train.activation_checkpointing={name}"
        assert run("stage2", tmp_path / name, *fresh, asked, config="stage2_lora") == 0
        files[name] = read_manifest(tmp_path / name / "final")["files"]
    same = ("adapter/adapter_model.safetensors", "optimizer.safetensors", "projector.safetensors")
    for name in same:
        assert files["auto"][name] == files["none"][name], name
    settled = json.loads((tmp_path / "auto" / activations.FILE).read_text())
    assert settled["policy"] == "none" and settled["trials"][0]["peak_bytes"] > 0
    assert "activation checkpointing: none (a step of" in capsys.readouterr().err
    # Going on: kept without measuring; on another device measured, and told.
    longer = [*fresh[:1], "train.max_steps=4", *fresh[2:], "--allow-change", "train.max_steps"]
    monkeypatch.setattr(activations, "_peak_of", lambda *args, **kwargs: pytest.fail("measured"))
    assert run("stage2", tmp_path / "auto", *longer, config="stage2_lora") == 0


def test_another_device_is_measured_again_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    caplog.set_level(logging.INFO)

    def chosen(device: str, policy: CheckpointPolicy) -> CheckpointPolicy:
        return activations.choose_policy(
            tmp_path,
            {"device": device, "batch": "2 records of up to 9 tokens"},
            lambda: (Trial(policy, 2**30, 2**32),),
            accelerator,
        ).policy

    assert chosen("A", "none") == "none"
    assert chosen("A", "full") == "none"  # kept
    assert chosen("B", "selective") == "selective"
    assert caplog.messages == [
        "activation checkpointing: none (a step of 2 records of up to 9 tokens: "
        "none took 1.00 GiB of 4.00 GiB)",
        "activation checkpointing: measured again because device was A, is B",
        "activation checkpointing: selective (a step of 2 records of up to 9 tokens: "
        "selective took 1.00 GiB of 4.00 GiB)",
    ]


GOOD: dict[str, Any] = {
    "policy": "none",
    "trials": [{"policy": "none", "peak_bytes": 1, "room_bytes": 2}],
    "basis": {"batch": "2 records"},
}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\xff",
        "my notes",
        "[]",
        "{}",
        "[" * 200_000,
        json.dumps(GOOD)[:-9],
        json.dumps({**GOOD, "policy": "fast"}),
        json.dumps({**GOOD, "policy": {}}),
        json.dumps({**GOOD, "trials": []}),
        json.dumps({**GOOD, "trials": [{"policy": "none"}]}),
        json.dumps({**GOOD, "trials": [{**GOOD["trials"][0], "room_bytes": "2"}]}),
        json.dumps({**GOOD, "basis": []}),
    ],
)
def test_a_damaged_choice_is_measured_again_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.setattr(filesystem, "_warned", set())
    reset_accelerate()
    path = tmp_path / activations.FILE
    path.write_text(text, encoding="latin-1")
    measured = Trial("selective", 2**30, 2**32)
    accelerator, basis = Accelerator(cpu=True), GOOD["basis"]
    for _ in range(2):
        choice = activations.choose_policy(tmp_path, basis, lambda: (measured,), accelerator)
        assert choice.policy == "selective"
    assert json.loads(path.read_text())["policy"] == "selective"
    printed = capsys.readouterr().err
    assert printed.count("cannot be used") == 1 and "measured again" in printed
