"""Load models of transformers from a folder or the hub, with errors of one sentence."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import dynamic_module_utils

from vlm_sft.config.schema import means_folder
from vlm_sft.errors import UserError
from vlm_sft.utils.hub import use_cache_if_hub_unreachable
from vlm_sft.utils.image_paths import nearest_existing
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.model_folders import custom_code_refused, require_plain_folder
from vlm_sft.utils.progress import waiting


def load_pretrained(load: Callable[..., Any], name: str, where: str, **kwargs: Any) -> Any:
    """Return `load(name, trust_remote_code=False, **kwargs)`.

    Args:
        load: A `from_pretrained` of transformers.
        name: A local folder or a hub name.
        where: The configuration key of the name, for error messages.
        kwargs: Passed on.

    Raises:
        UserError: If the folder does not exist or is incomplete, if the hub cannot be reached, if
            the model needs custom code, or if the folder contains a pipe or a device.
    """
    folder = Path(name).expanduser()
    if means_folder(name) and not folder.is_dir():
        raise UserError(f"{where}: no such folder {name!r}; give a model folder or a hub name")
    source = str(folder) if folder.is_dir() else name
    action = f"load the folder {name!r}"
    if not folder.is_dir():
        use_cache_if_hub_unreachable()
        near = nearest_existing(name, folder=True)
        action = f"get {name!r} from the hub, and there is no such folder{near}"
    with library_call("transformers", where, action), custom_code_refused(where, name):
        if folder.is_dir():
            require_plain_folder(folder)
        with waiting(f"loading {name}"):
            return load(source, trust_remote_code=False, **kwargs)


def require_all_tensors(info: Mapping[str, Any], where: str, name: str, kind: str) -> None:
    """Check that a folder had every tensor of its model, in the right shape.

    Args:
        info: What `from_pretrained` returns with `output_loading_info=True`.
        where: The setting that names the model.
        name: The folder or hub name.
        kind: What was loaded, e.g. `clip model`.

    Raises:
        UserError: Tensors are missing or of another shape.
    """
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"{where}: {name} lacks {len(missing)} tensors of its {kind}, the first being "
            f"{missing[0]}; take a complete folder",
            code="tensors_differ",
        )


@contextmanager
def no_custom_code_prompts() -> Iterator[None]:
    """Make transformers refuse custom code instead of asking on the terminal whether to run it.

    For libraries that call transformers without passing on `trust_remote_code`.
    """
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before
