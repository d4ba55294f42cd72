"""Push an exported folder to a model hub, in one commit or not at all.

The token is the one that huggingface_hub finds (`HF_TOKEN` or its login). It is never printed:
messages are checked for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from vlm_sft.errors import UserError
from vlm_sft.utils.libraries import one_line
from vlm_sft.utils.ownership import is_system_file

_WEIGHTS: Final = (".safetensors", ".bin", ".gguf", ".index.json")
_OWN: Final = "export.json"
_REMEDY: Final = {
    401: "the hub does not accept the token; set HF_TOKEN to a valid one or run `hf auth login`",
    403: "the token may not write there; take one with write access to this repository",
    404: "there is no such repository or revision, or the token may not see it",
}


def require_pushable(repo: str) -> None:
    """Check, before any work, that the name is one and that the hub knows the token.

    Raises:
        UserError: The name is malformed, there is no token, or the hub refuses it or is not there.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}: {one_line(error)}") from None
    if get_token() is None:
        raise UserError(
            f"--push-to-hub {repo}: there is no token; set HF_TOKEN or run `hf auth login`"
        )
    with _hub(repo, "nothing was exported or pushed"):
        HfApi().whoami()


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Push the files of an exported folder in one commit; return the commit's address.

    Args:
        folder: The exported folder, complete.
        repo: `owner/name`; created if it is not there.
        private: Whether the repository must be private.
        revision: Branch, created if it is not there; None for `main`.

    Raises:
        UserError: The hub refuses it, or the repository holds files that are not of an export.
    """
    api = HfApi()
    state = f"nothing was pushed; the export in {folder} is complete"
    with _hub(repo, state):
        name = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(name).private:
            raise UserError(
                f"--push-to-hub {repo}: the repository exists and is public, but --private was "
                f"given; make it private or name another one ({state})"
            )
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        _require_ours(folder, repo, api.list_repo_files(name, revision=revision), state)
    unknown = (
        "if the connection broke after the last file, the commit may be there, complete: look at "
        f"the repository; the export in {folder} is complete"
    )
    with _hub(repo, state, unknown):
        # Not `upload_folder`, which may divide the files among several commits.
        commit = api.create_commit(
            name,
            [CommitOperationAdd(path, folder / path) for path in _files(folder)],
            commit_message="Export of vlm_sft",
            revision=revision,
        )
    return str(commit.commit_url)


def _require_ours(folder: Path, repo: str, there: list[str], state: str) -> None:
    """Check that a repository is empty or holds an export whose files are all replaced.

    Raises:
        UserError: It has files of others, or weights that would be mixed with the new ones.
    """
    files = set(there) - {".gitattributes"}
    if files and _OWN not in files:
        raise UserError(
            f"--push-to-hub {repo}: the repository has files that are not of an export "
            f"({sorted(files)[0]}); name a new one, or a new --revision ({state})",
            code="not_ours",
        )
    others = files - set(_files(folder))
    mixed = sorted(name for name in others if name.endswith(_WEIGHTS))
    if mixed:
        raise UserError(
            f"--push-to-hub {repo}: its {mixed[0]} would be left beside the new weights; delete "
            f"it there, or name a new --revision ({state})",
            code="not_ours",
        )


def _files(folder: Path) -> list[str]:
    """Return the files of an export, without those that file managers put there."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in paths if not is_system_file(path.name))


@contextmanager
def _hub(repo: str, refused: str, unanswered: str | None = None) -> Iterator[None]:
    """Turn errors of the hub and of the network into one sentence without the token.

    Args:
        repo: For the message.
        refused: What was done if the hub refuses.
        unanswered: What was done if it gives no answer; None: as if it refused.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = _cause(error)
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
        if isinstance(cause, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set; unset it to push"
        elif status in _REMEDY:
            reason = f"HTTP {status}: {_REMEDY[status]}"
        elif status:
            reason = f"HTTP {status}: {one_line(cause)}"
        else:
            reason = f"the hub did not answer ({type(cause).__name__}: {one_line(cause)})"
        token = get_token()
        state = refused if status or unanswered is None else unanswered
        sentence = f"--push-to-hub {repo}: {reason}; {state}"
        raise UserError(sentence.replace(token, "***") if token else sentence) from None


def _cause(error: BaseException) -> BaseException:
    """Return the answer of the hub that an error was raised from, else its first cause."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error
