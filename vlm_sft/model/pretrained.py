"""Loading from a folder or the hub, with one sentence when it cannot be done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_sft.config import means_folder
from vlm_sft.errors import UserError
from vlm_sft.libraries import library_call


def load_pretrained(load: Callable[..., Any], name: str, where: str, **kwargs: Any) -> Any:
    """`load(name, **kwargs)` (a `from_pretrained`), its failures told in one sentence.

    Args:
        load: A `from_pretrained` of transformers.
        name: A local folder or a hub name.
        where: The configuration key that held the name.
        kwargs: Handed on.

    Raises:
        UserError: If the folder does not exist, is incomplete, or the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if means_folder(name) and not folder.is_dir():
        raise UserError(f"{where}: no such folder {name!r}; give a model folder or a hub name")
    source = str(folder) if folder.is_dir() else name
    action = f"load the folder {name!r}"
    if not folder.is_dir():
        action = f"get {name!r} from the hub, and there is no folder of that name"
    with library_call("transformers", where, action):
        return load(source, **kwargs)
