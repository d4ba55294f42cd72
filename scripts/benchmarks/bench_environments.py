"""Create the environments of the peers from the pins in `bench_peers/*.txt`, one folder each."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from vlm_sft.errors import UserError

PEERS = Path(__file__).parent / "bench_peers"
DEFAULT = Path("~/.cache/vlm_sft/bench")


def environment_python(name: str, root: Path) -> Path:
    """Return the Python of a peer's environment under `root`, creating the environment if needed.

    Raises:
        UserError: If uv is not installed, or cannot install the pinned versions.
    """
    pins = PEERS / f"{name}.txt"
    folder = root.expanduser() / name
    python = folder / "bin" / "python"
    stamp = folder / f".pins-{hashlib.sha256(pins.read_bytes()).hexdigest()[:16]}"
    if stamp.is_file():
        return python
    uv = _uv()
    print(
        f"creating {folder} from {pins.name} (torch is about 4 GB once)",
        file=sys.stderr,
        flush=True,
    )
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "--quiet", "--python", str(python), "--requirement", str(pins)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{folder}: uv cannot create this environment ({last.strip()})")
    stamp.touch()
    return python


def _uv() -> str:
    local = Path(sys.executable).parent / "uv"
    found = str(local) if local.is_file() else shutil.which("uv")
    if found is None:
        raise UserError("uv is not installed, and the peers' environments need it: pip install uv")
    return found
