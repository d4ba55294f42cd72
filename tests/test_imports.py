"""Imports run downward only, and importing a module only defines names."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "utils": 0,
    "errors": 0,
    "config": 1,
    "data": 2,
    "model": 2,
    "checkpoint": 3,
    "train": 4,
    "inference": 5,
    "evaluation": 5,
    "best_of": 5,
    "inspection": 5,
    "planning": 5,
    "checks": 5,
    "export": 5,
    "serving": 5,
    "commands": 6,
}
"""Layer of each package; a module imports from its own layer and from lower ones."""

ENTRY_POINT = 7


def modules() -> list[str]:
    files = [*ROOT.glob("vlm_sft/**/*.py"), *ROOT.glob("data_tools/**/*.py")]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    return sorted(name.removesuffix(".__init__") for name in names)


def imports_of(module: str) -> Iterator[str]:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def layer(module: str) -> int:
    """Return the layer of a module of `vlm_sft`, or of a name in one."""
    parts = module.split(".")
    if module.endswith("__main__"):
        return ENTRY_POINT
    return 0 if len(parts) == 1 else LAYERS.get(parts[1], ENTRY_POINT)


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("vlm_sft.")])
def test_imports_run_downward(module: str) -> None:
    for imported in imports_of(module):
        if imported.split(".")[0] == "data_tools":
            pytest.fail(f"{module} imports {imported}: the trainer does not know the data tools")
        if not imported.startswith("vlm_sft."):
            continue
        assert layer(imported) <= layer(module), f"{module} imports {imported} upward"


@pytest.mark.parametrize("module", modules())
def test_packages_do_not_import_what_they_must_not_know(module: str) -> None:
    forbidden = {
        "vlm_sft.data": ("vlm_sft.model",),
        "vlm_sft.model": (
            "vlm_sft.data.hf_tokenizer",
            "vlm_sft.data.text_encoder",
            "vlm_sft.data.record_formats",
            "vlm_sft.data.records",
            "vlm_sft.data.dataset",
        ),
        "vlm_sft.train": (
            "vlm_sft.model.lora",
            "vlm_sft.data.chat_template",
            "vlm_sft.data.tokenize",
        ),
        "data_tools": ("torch", "transformers", "vlm_sft.model", "vlm_sft.train"),
    }
    for package, secrets in forbidden.items():
        if module == "vlm_sft.train.setup":  # builds what the rest of its package uses
            continue
        if module == package or module.startswith(package + "."):
            for imported in imports_of(module):
                for secret in secrets:
                    assert not (imported == secret or imported.startswith(secret + ".")), (
                        f"{module} imports {imported}"
                    )


def test_importing_everything_prints_nothing_and_sets_no_environment() -> None:
    names = [m for m in modules() if not m.endswith("__main__")]
    code = (
        "import os, importlib\nbefore = dict(os.environ)\n"
        "import torch, transformers, datasets, accelerate, peft, timm, open_clip, matplotlib\n"
        "before = dict(os.environ)\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert dict(os.environ) == before, 'an import changed the environment'\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
