"""Check once whether the model hub is reachable, instead of retrying for every file."""

import functools

from vlm_sft.utils.console import echo
from vlm_sft.utils.libraries import one_line

TIMEOUT = 10.0
"""Timeout of the check, in seconds."""


@functools.cache
def use_cache_if_hub_unreachable() -> None:
    """Use only cached files for the rest of the process if the hub does not answer.

    The hub's client retries every file for half a minute, and a model has many files. Call this
    before a library loads a model that is not a local folder. `HF_HUB_OFFLINE` is respected.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # whatever the HTTP library raises, the hub is not reachable
        constants.HF_HUB_OFFLINE = True
        echo(
            f"note: the hub {constants.ENDPOINT} cannot be reached ({one_line(error)}); only "
            "models in its local cache are found"
        )
