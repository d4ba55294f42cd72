"""Load model folders without running code from them or opening pipes and devices."""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.reading import require_regular

MAX_TEXT_BYTES: Final = 512 * 2**20
"""Maximum size of text files in model folders, far above any real `tokenizer.json` or index."""

_TEXT: Final = (".json", ".jinja", ".txt", ".yaml", ".model")


@contextmanager
def custom_code_refused(key: str, name: str) -> Iterator[None]:
    """Report a model that cannot be loaded without running its own Python code.

    For calls of transformers with `trust_remote_code=False`; its own message would advise the user
    to set that option.

    Args:
        key: The configuration key of the name.
        name: The folder or hub name.

    Raises:
        UserError: `custom_code`; any other exception passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{key}: {name!r} needs its own Python code (`auto_map` in one of its JSON files), but "
            "code from model folders is never run; use a model that is built into transformers, "
            "or convert this one",
            code="custom_code",
        ) from error


def report_unused_code(key: str, name: str, config: Any) -> None:
    """Print a note if a folder names its own code but transformers has the model built in."""
    if getattr(config, "auto_map", None):
        echo(
            f"note: {key}: {name!r} names its own Python code (`auto_map`), which is not run; "
            f"the {config.model_type!r} model of transformers is used"
        )


def refuse_remote_kernels(key: str, name: str, config: Any) -> None:
    """Refuse a configuration that makes transformers download and run a kernel from a hub.

    Raises:
        UserError: `custom_code`, with the repository of the kernel.
    """
    for part in (config, *vars(config).values()):
        for field in ("_attn_implementation_internal", "_experts_implementation_internal"):
            value = getattr(part, field, None)
            named = value.values() if isinstance(value, Mapping) else [value]
            for kernel in named:
                if isinstance(kernel, str) and "/" in kernel:
                    raise UserError(
                        f"{key}: the config.json of {name!r} requests the kernel {kernel!r}, which "
                        "is code from a hub and is never run; remove `attn_implementation` and "
                        "`experts_implementation` from it",
                        code="custom_code",
                    )


def require_plain_folder(folder: str | Path) -> None:
    """Refuse a folder that contains a pipe, a device or an extremely large text file.

    Raises:
        UserError: With the path of the entry; `not_a_file` or `file_too_large`.
        OSError: The folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        try:
            status = entry.stat()
        except OSError:
            continue  # a dangling link; a reader that needs it reports it
        if stat.S_ISDIR(status.st_mode):
            continue
        require_regular(entry.path)
        if entry.name.endswith(_TEXT) and status.st_size > MAX_TEXT_BYTES:
            raise UserError(
                f"{entry.path}: {status.st_size:,} bytes, but such a file has at most "
                f"{MAX_TEXT_BYTES:,}; it is damaged or has the wrong name",
                code="file_too_large",
            )
