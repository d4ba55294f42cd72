"""Weights shared out over processes are trained, saved and read as if one process had them."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.tiny_runs import run
from tests.train.test_train_step import eight_records
from tests.train.tiny import double_model, in_processes
from vlm_sft.checkpoint.components import language_model_component
from vlm_sft.checkpoint.format import verify
from vlm_sft.checkpoint.optimizer import optimizer_component
from vlm_sft.checkpoint.shards import consolidate_shards, load_shards, snapshot_shard
from vlm_sft.checkpoint.snapshot import plain_component, tensor_component
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.checkpoint.tensor_files import copy_tensors, load_tensors, save_tensors
from vlm_sft.config.schema import OptimConfig, load_config
from vlm_sft.data.batch import PaddedCollator
from vlm_sft.data.loader import load_steps, micro_batches_of_rank
from vlm_sft.errors import CheckpointError, ConfigError
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.distributed import checkpoint_group, make_accelerator
from vlm_sft.train.fsdp import choose_sharding, shard
from vlm_sft.train.optimizer import build_optimizer, gradient_norm
from vlm_sft.train.preflight import dry_run_save
from vlm_sft.train.train_step import accumulate_gradient
from vlm_sft.utils.dtensor import full_tensor, local_tensor, rows_of_rank
from vlm_sft.utils.process_group import ProcessGroup

STEPS = 2
"""Optimizer steps between two checkpoints."""

OPTIM = OptimConfig.model_validate({"learning_rate": {"projector": 1e-2, "language_model": 1e-2}})


class Run:
    """A model in float64 with its optimizer and checkpoints, shared out if there are several."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = accelerator
        self.model: VisionLanguageModel = double_model("projector", "language_model")
        group = ProcessGroup()
        if accelerator.num_processes > 1:
            shard(self.model, accelerator, "fp32")
            group = checkpoint_group(accelerator)
        self.optimizer = build_optimizer(parameters_by_part(self.model), OPTIM)
        projector = self.model.multi_modal_projector
        components = {
            "projector": tensor_component(
                projector.state_dict,
                lambda f, tensors: save_tensors(f / "projector.safetensors", tensors),
                lambda f: copy_tensors(
                    load_tensors(f / "projector.safetensors"), projector.state_dict(), f
                ),
            ),
            "language_model": language_model_component(self.model),
            "optimizer": optimizer_component(self.optimizer),
        }
        learning = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.store = CheckpointStore(folder, components, trainable=learning, group=group, keep=9)

    def go_on(self) -> list[float]:
        """Load the newest checkpoint if there is one, train, save; the losses."""
        newest = self.store.newest() if self.accelerator.is_main_process else None
        newest = self.store.group.rank0_then_broadcast(lambda: newest)
        if newest is not None:
            self.store.load(newest)
        first = newest.step if newest else 0
        losses = [self._step() for _ in range(STEPS)]
        self.store.save({"step": first + STEPS})
        return losses

    def _step(self) -> float:
        collator = PaddedCollator(2, pad_token_id=0)
        chunks = micro_batches_of_rank(
            collator,
            eight_records(),
            list(range(8)),
            world_size=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
        )
        (batches,) = load_steps(eight_records(), [chunks], collator=collator, num_workers=0)
        self.optimizer.zero_grad()
        gradient = accumulate_gradient(self.model, batches, self.accelerator)
        gradient_norm(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"]
        self.optimizer.step()
        return gradient.loss

    def weights(self) -> dict[str, Any]:
        """Everything that learns, whole."""
        named = self.model.named_parameters()
        return {n: full_tensor(p).detach().numpy() for n, p in named if p.requires_grad}


def go_on(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    run = Run(accelerator, folder)
    losses = run.go_on()
    return {"losses": losses, "weights": run.weights()}


def two_processes_with_trouble(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """What two processes find: a run gone on with, and everything that can go wrong."""
    found = go_on(accelerator, folder / "run")
    run = Run(accelerator, folder / "trouble")
    run.go_on()
    found["few rows"] = few_rows(accelerator, folder)
    found["rehearsal"] = rehearsal(run, folder)
    found["refused"] = what_is_raised(lambda: one_cannot_write(run))
    accelerator.wait_for_everyone()
    found["left"] = sorted(p.name for p in (folder / "trouble" / "checkpoints").iterdir())
    found["forgotten"] = what_is_raised(lambda: one_forgets(run))
    return found


def few_rows(accelerator: Accelerator, folder: Path) -> list[Any]:
    """Tensors with fewer rows than processes, through the disk and back."""
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    live = {"one": torch.ones(1, 3), "five": torch.arange(5.0), "none": torch.zeros(0, 2)}
    shared = {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in live.items()}
    snapshot_shard({**shared, "scalar": torch.tensor(7.0)}).write(folder / "few")
    accelerator.wait_for_everyone()
    for tensor in shared.values():
        local_tensor(tensor).fill_(-1)
    back = {**shared, "scalar": torch.tensor(0.0)}
    load_shards(folder / "few", back)
    return [full_tensor(tensor).tolist() for tensor in back.values()]


def rehearsal(run: Run, folder: Path) -> bool:
    before = run.weights()
    learning = [(n, p) for n, p in run.model.named_parameters() if p.requires_grad]
    dry_run_save(folder, run.store.components, learning, run.store.group)
    return all((before[n] == w).all() for n, w in run.weights().items())


def one_cannot_write(run: Run) -> None:
    def write(folder: Path) -> None:
        if run.accelerator.process_index == 1:
            raise OSError(28, "No space left on device")

    everywhere = run.store.components["language_model"].tensors
    bad = plain_component(write)
    store = CheckpointStore(
        run.store.output_dir,
        {**run.store.components, "bad": type(bad)(bad.snapshot, tensors=everywhere)},
        group=run.store.group,
    )
    store.save({"step": 77})


def one_forgets(run: Run) -> None:
    """Only the second process finds something that learns and is not saved."""
    if run.accelerator.process_index == 1:
        run.store.trainable = {**run.store.trainable, "lost": torch.nn.Parameter(torch.ones(2))}
    run.store.save({"step": 78})


def what_is_raised(action: Callable[[], None]) -> str:
    try:
        action()
    except (CheckpointError, OSError) as error:
        return repr(error)
    return "nothing"


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One run that went on with 1, 2, 3 and 1 processes, and one that had one process always."""
    folder = tmp_path_factory.mktemp("elastic")
    one = make_accelerator("fp32")
    parts: list[Sequence[Any]] = [[go_on(one, folder / "run")]]
    parts.append(in_processes(2, two_processes_with_trouble, folder))
    parts.append(in_processes(3, go_on, folder / "run"))
    parts.append([go_on(one, folder / "run")])
    always = [go_on(one, folder / "always") for _ in parts]
    yield {"parts": parts, "always": always, "folder": folder}


@pytest.mark.slow
def test_a_run_resumes_on_any_number_of_ranks(elastic: dict[str, Any]) -> None:
    for processes, expected in zip(elastic["parts"], elastic["always"], strict=True):
        for found in processes:
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-11)
            for name, weights in expected["weights"].items():
                assert found["weights"][name] == pytest.approx(weights, rel=1e-9, abs=1e-11), name


@pytest.mark.slow
def test_each_rank_writes_its_own_rows(elastic: dict[str, Any]) -> None:
    folder = elastic["folder"] / "run" / "checkpoints" / "step-00000006" / "language_model"
    index = json.loads((folder / "model.pieces.json").read_text())
    assert index["processes"] == 3
    assert index["aliases"] == {"lm_head.weight": "transformer.wte.weight"}
    pieces = [load_file(folder / f"model.piece-{k:05d}-of-00003.safetensors") for k in (1, 2, 3)]
    name = "transformer.wte.weight"
    assert [len(piece[name]) for piece in pieces] == [14, 14, 12]
    consolidated = consolidate_shards(folder / "model")[name]
    assert torch.equal(torch.cat([p[name] for p in pieces]), consolidated)


@pytest.mark.slow
def test_a_finished_run_has_one_model_that_transformers_reads(
    elastic: dict[str, Any], tmp_path: Path
) -> None:
    run = Run(make_accelerator("fp32"), elastic["folder"] / "run")
    store = run.store
    step = store.steps_dir / "step-00000006"
    before = {p: p.read_bytes() for p in step.rglob("*") if p.is_file()}
    store.output_dir = tmp_path
    final = store.finish(verify(step))
    model = causal_lm(run.model.language_model)
    loaded = type(model).from_pretrained(final.folder / "language_model", dtype=torch.float64)
    expected = consolidate_shards(step / "language_model" / "model")
    assert not list((final.folder / "language_model").glob("*piece*"))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert before == {p: p.read_bytes() for p in step.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_tensors_with_fewer_rows_than_ranks_are_restored(elastic: dict[str, Any]) -> None:
    for found in elastic["parts"][1]:
        assert found["few rows"] == [[[1.0] * 3], [0.0, 1.0, 2.0, 3.0, 4.0], [], 7.0]


@pytest.mark.slow
def test_all_ranks_take_part_in_the_dry_run_of_saving(elastic: dict[str, Any]) -> None:
    assert all(found["rehearsal"] for found in elastic["parts"][1])


@pytest.mark.slow
def test_a_failed_write_of_one_rank_is_raised_on_all_and_leaves_nothing(
    elastic: dict[str, Any],
) -> None:
    for found in elastic["parts"][1]:
        assert "No space left on device" in found["refused"]
        assert found["left"] == ["step-00000002"]


@pytest.mark.slow
def test_a_tensor_that_one_rank_would_not_save_stops_all_ranks(elastic: dict[str, Any]) -> None:
    for found in elastic["parts"][1]:
        assert "lost is trainable but no part of a checkpoint saves it" in found["forgotten"]


def test_rows_are_cut_as_torch_chunks_them() -> None:
    for processes in range(1, 6):
        for rows in range(12):
            chunks = torch.arange(rows).chunk(processes)
            sizes = [len(chunk) for chunk in chunks] + [0] * (processes - len(chunks))
            bounds = [rows_of_rank(rows, process, processes) for process in range(processes)]
            assert [stop - start for start, stop in bounds] == sizes


def test_sharing_out_is_refused_where_it_does_not_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    with pytest.raises(ConfigError, match="for full fine-tuning"):
        run("stage1", tmp_path / "run", "train.sharding=zero3")
    config, full = load_config("configs/tiny/stage2.yaml"), {"projector", "language_model"}
    for key in ("optim.optimizer=adamw_8bit", "train.compile=true", "train.fp8=true"):
        setting = key.replace("=", ": ")
        asked = load_config("configs/tiny/stage2.yaml", [key])
        with pytest.raises(ConfigError, match=f"{setting} does not work with sharded weights"):
            choose_sharding(asked, full, world_size=2)
        assert choose_sharding(asked, {"projector", "adapter"}, world_size=2) == "none"
    assert choose_sharding(config, full, world_size=2) == "zero3"
    assert choose_sharding(config, full, world_size=1) == "none"
    zero2 = load_config("configs/tiny/stage2.yaml", ["train.sharding=zero2"])
    assert choose_sharding(zero2, full, world_size=2) == "zero2"
    with pytest.raises(ConfigError, match="use bf16 or fp32"):
        shard(double_model("projector"), make_accelerator("fp32"), "fp16")
