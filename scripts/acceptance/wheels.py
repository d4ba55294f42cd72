"""Packages that the GPU machine lacks, carried there as wheels."""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

MODULES: Final = {
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection",
    "simplejpeg": "simplejpeg",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
}
"""Modules that vlm_sft or a part imports and the machine's image does not have, with the packages
that hold them. The first five are needed by every part; the others by QLoRA and fp8."""

LIMIT: Final = 64 * 2**20
"""Bytes that can be carried in all."""

_PLATFORMS: Final = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


class WheelError(Exception):
    """A package cannot be fetched, carried or installed; the message says which and why."""


def prepare(folder: Path, *, python: str, constraints: Path) -> int:
    """Download the wheels for `python` (such as `3.12`) into `folder`; return their bytes.

    Versions are those that `constraints` pins, where it pins them.

    Raises:
        WheelError: A wheel cannot be fetched, or all together are too large to be carried.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pins = _pins(constraints)
    for package in MODULES.values():
        wanted = f"{package}=={pins[package]}" if package in pins else package
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        for platform in _PLATFORMS:
            command += ["--platform", platform]
        done = subprocess.run(
            [*command, "--dest", str(folder), wanted], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise WheelError(f"{wanted}: no wheel for Python {python} ({_last(done.stderr)})")
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    if size > LIMIT:
        raise WheelError(
            f"{folder}: the wheels take {size / 2**20:.1f} MiB, more than the "
            f"{LIMIT // 2**20} MiB that can be carried"
        )
    return size


def missing_modules() -> list[str]:
    """Return the modules of `MODULES` that this Python cannot import."""
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


def install(folder: Path) -> Path:
    """Install the wheels of `folder` into a new folder for this run's processes; return it.

    Raises:
        WheelError: pip refuses a wheel.
    """
    target = Path(tempfile.mkdtemp(prefix="vlm-sft-wheels-"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--target", str(target)]
    wheels = [str(wheel) for wheel in sorted(folder.glob("*.whl"))]
    done = subprocess.run([*command, *wheels], capture_output=True, text=True, check=False)
    if done.returncode:
        raise WheelError(f"{folder}: the wheels cannot be installed ({_last(done.stderr)})")
    return target


def _pins(constraints: Path) -> dict[str, str]:
    lines = constraints.read_text(encoding="utf-8").splitlines()
    pairs = (line.strip().split("==") for line in lines if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
