"""What must hold on this device: precision, kernels, packing, merging, repetition, resuming."""

import copy
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_sizes import Size
from torch import Tensor, nn

from acceptance.figures import Job
from acceptance.models import Records, forget, make_model, mixture, run_config
from vlm_sft.data.batch import Collator, PackedCollator, PaddedCollator
from vlm_sft.data.loader import load_steps, micro_batches_of_rank
from vlm_sft.errors import UserError
from vlm_sft.model.lora import merged_language_model
from vlm_sft.model.packed_attention import PackedLayout, choose_backend, packed_attention
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.optimizer import build_optimizer
from vlm_sft.train.packing_check import prepare_packing
from vlm_sft.train.train_step import StepGradient, accumulate_gradient

ROOT = Path(__file__).parent.parent.parent.parent
SIZE = Size("small head dimensions", 2, 64, 2, 2, 128, 256, 2, vocabulary=512)
"""Two heads of 64, as 7B models' kernels need at least."""

SEGMENTS = [(170, -1), (90, -1), (33, 1), (64, 1), (5, -1), (127, -1), (20, 5), (71, 5)]
"""Whole records, and prefixes with branches."""

BACKENDS = ("sdpa", "flex", "varlen", "flash_attn")


def main(job: Job) -> None:
    """Check everything; the long runs of the last checks go on beside the others."""
    runs = StageRuns(job)
    try:
        for check in (precision, scaler, attention, packing, merging):
            check(job)
        with job.figures("deterministic", "resume", "frozen"):
            runs.compare()
    finally:
        runs.close()


def precision(job: Job) -> None:
    """Compare a bf16 forward pass on the device with float64 on the CPU, weights being equal."""
    with job.figures("bf16_loss"):
        device = torch.device(job.device)
        forget(device)
        model = make_model(run_config(SIZE, "lora", pack=2048), "lora", device)
        records = mixture(4, SIZE)
        accelerator = make_accelerator("bf16")
        found = _gradient(model, records, PaddedCollator(2, 0), accelerator)
        forget(device)
        exact = copy.deepcopy(model).cpu().double()
        reference = _gradient(exact, records, PaddedCollator(2, 0), _on_the_cpu())
        job.record("bf16_loss", abs(found.loss / reference.loss - 1))


def scaler(job: Job) -> None:
    """Compare an fp16 gradient with an fp32 one, and see an overflow skipped."""
    if job.device != "cuda":
        for key in ("fp16_gradient", "fp16_overflow"):
            job.missing(key, "fp16 needs a GPU")
        return
    device = torch.device(job.device)
    with job.figures("fp16_gradient", "fp16_overflow"):
        forget(device)
        config = run_config(SIZE, "stage1", pack=2048)
        model = make_model(config, "stage1", device).float()
        records = mixture(4, SIZE)
        gradients = []
        for name in ("fp32", "fp16"):
            forget(device)
            accelerator = make_accelerator(name)  # type: ignore[arg-type]
            model.zero_grad(set_to_none=True)
            _gradient(model, records, PaddedCollator(2, 0), accelerator)
            scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
            gradients.append(_flat_gradient(model).double() / scale)
        error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
        job.record("fp16_gradient", float(error))
        optimizer = build_optimizer(parameters_by_part(model), config.optim)
        before = copy.deepcopy(model.multi_modal_projector.state_dict())
        scale = accelerator.scaler.get_scale()
        for parameter in model.multi_modal_projector.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(float("inf"))
        accelerator.scaler.step(optimizer)
        accelerator.scaler.update()
        same = all(
            torch.equal(before[name], value)
            for name, value in model.multi_modal_projector.state_dict().items()
        )
        job.record("fp16_overflow", same and accelerator.scaler.get_scale() == scale / 2)


def attention(job: Job) -> None:
    """Compare every kernel with float64, forward and backward, on packed and shared rows."""
    device = torch.device(job.device)
    states = _states(SEGMENTS)
    expected = _attend(states, "sdpa", torch.device("cpu"), torch.float64)
    for backend in BACKENDS:
        keys = (f"{backend}_forward", f"{backend}_backward")
        with job.figures(*keys):
            try:
                choose_backend(backend, device, torch.bfloat16, 0.0)
            except UserError:
                for key in keys:
                    job.missing(key, f"{backend} is not available on this machine")
                continue
            found = _attend(states, backend, device, torch.bfloat16)
            job.record(keys[0], _relative(found[0], expected[0]))
            errors = [_relative(a, b) for a, b in zip(found[1:], expected[1:], strict=True)]
            job.record(keys[1], max(errors), "the largest of query, key and value")


def packing(job: Job) -> None:
    """Compare packed and shared rows with padded ones, in fp32 on the device."""
    device = torch.device(job.device)
    with job.figures("packed_loss", "packed_gradient", "shared_loss"):
        forget(device)
        config = run_config(SIZE, "stage1", pack=4096, precision="fp32")
        model = make_model(config, "stage1", device).float()
        records = mixture(6, SIZE)
        accelerator = make_accelerator("fp32")
        padded = _gradient(model, records, PaddedCollator(3, 0), accelerator)
        gradient = _flat_gradient(model)
        assert config.train.packing is not None
        backend = prepare_packing(model, config.train.packing, "fp32", device)
        found = []
        for shared in (False, True):
            model.zero_grad(set_to_none=True)
            collator = PackedCollator(4096, shared, 1, 0.0, 0)
            found.append(_gradient(model, records, collator, accelerator))
            if not shared:
                error = (_flat_gradient(model) - gradient).norm() / gradient.norm()
        job.record("packed_loss", abs(found[0].loss / padded.loss - 1), f"kernel: {backend}")
        job.record("packed_gradient", float(error))
        job.record("shared_loss", abs(found[1].loss / padded.loss - 1))


def merging(job: Job) -> None:
    """Compare merged weights with base and adapter, in fp32 on the device."""
    device = torch.device(job.device)
    with job.figures("merged_logits"):
        forget(device)
        model = make_model(run_config(SIZE, "lora", pack=2048), "lora", device).float().eval()
        draw = torch.Generator(device).manual_seed(0)
        for name, parameter in parameters_by_part(model)["adapter"]:
            if ".lora_B." in name:
                parameter.data.normal_(std=0.05, generator=draw)
        ids = torch.randint(3, SIZE.vocabulary, (1, 64), generator=draw, device=device)
        with torch.no_grad():
            expected = model.language_model(ids).logits
            merged = merged_language_model(model)(ids).logits
        job.record("merged_logits", _relative(merged, expected))


class StageRuns:
    """Stage 2 of the tiny LoRA configuration: run twice, and once killed and resumed.

    They are processes of their own and run beside the other checks.
    """

    STEPS, KILLED_AT = 6, "checkpoint.renamed:2"

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = Path(tempfile.mkdtemp(prefix="vlm-sft-acceptance-runs-"))
        self.killed = self._start("killed", killed_at=self.KILLED_AT)
        names = ["first"] if job.tiny else ["first", "second"]
        self.running = [self._start(name) for name in names]

    def compare(self) -> None:
        """Record whether the runs ended in the same bits, and the frozen parts unchanged."""
        names = ["first", "killed"] if self.job.tiny else ["first", "killed", "second"]
        if self.killed.wait() != -9:
            raise RuntimeError(f"the run to be killed was not: {self._log('killed')}")
        self.running.append(self._start("killed"))
        for process in self.running:
            if process.wait() != 0:
                raise RuntimeError("; ".join(self._log(name) for name in names))
        manifests = [
            json.loads((self.folder / name / "final/manifest.json").read_text()) for name in names
        ]
        weights = [
            {name: sha for name, sha in manifest["files"].items() if "safetensors" in name}
            for manifest in manifests
        ]
        assert weights[0]
        self.job.record("resume", weights[0] == weights[1], f"killed at {self.KILLED_AT}")
        if self.job.tiny:
            self.job.missing("deterministic", "one whole run when tiny; see the resumed one")
        else:
            self.job.record("deterministic", weights[0] == weights[2])
        frozen = [manifest["frozen"] for manifest in manifests]
        steps = sorted((self.folder / "first/checkpoints").glob("step-*/manifest.json"))
        earlier = [json.loads(path.read_text())["frozen"] for path in steps]
        unchanged = bool(frozen[0]) and all(each == frozen[0] for each in (*frozen, *earlier))
        self.job.record("frozen", unchanged, f"{', '.join(sorted(frozen[0]))}")

    def close(self) -> None:
        """End what still runs and delete the folders."""
        for process in (self.killed, *self.running):
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, *, killed_at: str | None = None) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m"]
        command += ["tests.tools.reliability.kill_places", killed_at] if killed_at else []
        command += ["vlm_sft.stage2", "configs/tiny/stage2_lora.yaml"]
        command += [f"output_dir={self.folder / name}", "projector=null", "train.trackers=[]"]
        command += [f"train.max_steps={self.STEPS}", "train.save_every_steps=2"]
        command += ["train.eval_every_steps=null", "data.eval=[]", "train.eval_samples=0"]
        command += ["train.deterministic=true", "data.num_workers=0"]
        log = (self.folder / f"{name}.log").open("ab")
        with log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def _log(self, name: str) -> str:
        text = (self.folder / f"{name}.log").read_text(errors="replace").strip()
        return f"{name}: {text[-300:]}"


def _gradient(
    model: VisionLanguageModel,
    records: Records,
    collator: Collator,
    accelerator: Any,
) -> StepGradient:
    chunks = micro_batches_of_rank(collator, records, range(len(records)), world_size=1, rank=0)
    batches = next(load_steps(records, [chunks], collator=collator, num_workers=0))
    return accumulate_gradient(model, batches, accelerator)


def _on_the_cpu() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="no")


def _flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _states(segments: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return query, key, value and a gradient, bf16 values held in float64."""
    draw = torch.Generator().manual_seed(3)
    total = sum(length for length, _ in segments)
    shapes = [(1, heads, total, 64) for heads in (4, 2, 2)] + [(1, total, 4, 64)]
    return [torch.randn(s, generator=draw).bfloat16().double() for s in shapes]


def _attend(
    states: Sequence[Tensor], backend: Any, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Return the output and the gradients of query, key and value, in float64 on the CPU."""
    query, key, value = (s.clone().detach().to(device, dtype).requires_grad_() for s in states[:3])
    layout = PackedLayout(SEGMENTS, device, backend)
    out = packed_attention(
        nn.Identity(), query, key, value, None, scaling=64**-0.5, packed_layout=layout
    )[0]
    out.backward(states[3].to(device, dtype))
    found = [out.detach(), query.grad, key.grad, value.grad]
    return [tensor.double().cpu() for tensor in found if tensor is not None]


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1])))
