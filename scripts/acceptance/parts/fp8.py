"""fp8 layers against bf16 ones: how much they differ, and how much faster they are."""

import copy
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acceptance.figures import Job

if TYPE_CHECKING:
    import torch

KEYS = ("fp8_error", "fp8_speedup")


def main(job: Job) -> None:
    """Record the error and the speed of fp8 on two layers of 7B shapes."""
    if job.device == "cpu":  # before the imports, which would take longer than all that follows
        for key in KEYS:
            job.missing(key, "fp8 needs a GPU of compute capability 8.9 or more")
        return
    import torch

    from acceptance.models import SIZES, forget, make_model, run_config
    from vlm_sft.model.fp8 import require_fp8, use_fp8

    device = torch.device(job.device)
    with job.figures(*KEYS):
        require_fp8(device, "bf16")
        size = dataclasses.replace(SIZES["7b"], layers=2, vocabulary=1024)
        config = run_config(size, "lora", pack=None).model_copy(update={"lora": None})
        plain = make_model(config, "stage1", device)
        quick = copy.deepcopy(plain)
        names = use_fp8(quick)
        states = torch.randn(1, 8192, size.width, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            expected, found = (_decoder(m)(inputs_embeds=states)[0] for m in (plain, quick))
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        job.record("fp8_error", float(error), f"{len(names)} layers")
        seconds = [_seconds(torch.compile(_decoder(m)), states) for m in (plain, quick)]
        note = f"{seconds[0] * 1e3:.1f} against {seconds[1] * 1e3:.1f} ms"
        job.record("fp8_speedup", seconds[0] / seconds[1], note)
    forget(device)


def _decoder(model: Any) -> Any:
    from vlm_sft.model.language_model import causal_lm, decoder_of

    return decoder_of(causal_lm(model.language_model))


def _seconds(decoder: Any, states: "torch.Tensor") -> float:
    """Return the seconds of a forward and backward pass: median of 5 after 3 that warm up."""
    import torch

    states = states.clone().requires_grad_()
    found = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        decoder(inputs_embeds=states)[0].float().square().mean().backward()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return sorted(found[3:])[2]


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1])))
