"""Write the weights of an exported model under the names of the released LLaVA folders."""

import re
from pathlib import Path
from typing import Final

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.progress import track

INDEX: Final = "model.safetensors.index.json"

_TOWER: Final = "vision_tower."
_SIZE: Final = re.compile(r"^\d+(\.\d+)?\s*(KB|MB|GB|TB)$", re.IGNORECASE)


def released_state(stock: PreTrainedModel, vision_level: str) -> dict[str, Tensor]:
    """Return the tensors of a model under the names of the released folders.

    transformers keeps other names in memory: `model.language_model.layers...` is released as
    `language_model.model.layers...`, and experts that it fuses are released one by one. CLIP and
    SigLIP lost their `vision_model` level in transformers 5.6. Older versions and other programs
    read only the names with it; newer ones read both.

    Args:
        stock: A vision-language model of transformers.
        vision_level: `vision_model.` for towers that are released with this level, else empty.
    """
    state = dict(stock.state_dict())
    if stock.config.tie_word_embeddings:
        del state["lm_head.weight"]
    released: dict[str, Tensor] = revert_weight_conversion(stock, state)
    return {
        _TOWER + vision_level + name.removeprefix(_TOWER) if name.startswith(_TOWER) else name: (
            tensor.contiguous()
        )
        for name, tensor in released.items()
    }


def write_weights(folder: Path, state: dict[str, Tensor], max_shard_size: str) -> list[str]:
    """Write `model.safetensors`, or several files and their index; return the files' names."""
    plan = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    files = plan.filename_to_tensors.items()
    for filename, names in track(files, len(files), "writing weights, files"):
        shard = {name: state[name] for name in names}
        save_file(shard, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)
    return sorted(plan.filename_to_tensors)


def require_shard_size(text: str) -> str:
    """Return a size such as `5GB` unchanged.

    Raises:
        UserError: The text is not a size.
    """
    if not _SIZE.match(text) or float(re.split(r"[A-Za-z]", text)[0]) <= 0:
        raise UserError(
            f"--max-shard-size: found {text!r}, expected a number and a unit, such as 5GB or 500MB"
        )
    return text
