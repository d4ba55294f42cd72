"""The places at which the kill tests end a run exist and are reached in a save."""

from collections.abc import Iterator
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.tools.reliability.kill_places import PLACES, interrupted
from vlm_sft.checkpoint.snapshot import tensor_component
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.checkpoint.tensor_files import copy_tensors, load_tensors, save_tensors


def functions() -> Iterator[str]:
    for place in PLACES.values():
        yield place.function
        yield from place.within


@pytest.mark.parametrize("function", sorted(set(functions())))
def test_every_function_that_a_place_names_exists(function: str) -> None:
    module, _, name = function.partition(":")
    assert callable(reduce(getattr, name.split("."), import_module(module)))


def new_store(folder: Path, live: dict[str, torch.Tensor]) -> CheckpointStore:
    component = tensor_component(
        lambda: live,
        lambda f, tensors: save_tensors(f / "w.safetensors", tensors),
        lambda f: copy_tensors(load_tensors(f / "w.safetensors"), live, f),
    )
    return CheckpointStore(folder, {"w": component}, keep=1)


@pytest.mark.parametrize(
    "place", [name for name in PLACES if name.startswith(("checkpoint.", "final."))]
)
def test_a_place_is_reached_once_in_a_save_and_patches_are_removed(
    place: str, tmp_path: Path
) -> None:
    reached: list[str] = []
    checkpoints = new_store(tmp_path, {"w": torch.ones(2)})
    checkpoints.save({"step": 1})
    step = 1 if place == "checkpoint.replaced" else 2
    with interrupted(place, lambda: reached.append(place)):
        checkpoints.finish(checkpoints.save({"step": step}))
    assert reached == [place]
    checkpoints.finish(checkpoints.save({"step": 3}))
    assert reached == [place]
