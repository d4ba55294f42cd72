"""Imports run downward only, and importing a module only defines names."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = {
    "command_line", "yaml_text", "setting_errors", "hub",
    "constants", "error_codes", "errors", "settings", "config", "atomic", "progress", "crash",
    "visible", "ownership", "libraries", "console", "image_paths", "reading",
    "filesystem", "commands", "model_folders", "streams",
}  # fmt: skip
ENTRY_POINTS = {
    "vlm_sft.stage1",
    "vlm_sft.stage2",
    "vlm_sft.check",
    "vlm_sft.plan",
    "vlm_sft.show",
    "vlm_sft.chat",
    "vlm_sft.evaluate",
    "data_tools.make_scenes",
    "data_tools.build_coco",
    "data_tools.mix",
}


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
    """0 base, 1 data and model, 2 train, 3 assembly, evaluation and export, 4 entry points."""
    if module in ENTRY_POINTS or module.endswith("__main__"):
        return 4
    parts = module.split(".")
    if len(parts) == 1 or parts[1] in BASE:
        return 0
    return {"data": 1, "model": 1, "train": 2}.get(parts[1], 3)


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("vlm_sft")])
def test_imports_run_downward(module: str) -> None:
    for imported in imports_of(module):
        if imported.split(".")[0] == "data_tools":
            pytest.fail(f"{module} imports {imported}: the trainer does not know the data tools")
        if imported.split(".")[0] != "vlm_sft" or imported == "vlm_sft":
            continue
        assert layer(imported) <= layer(module), f"{module} imports {imported}, which lies above"
        if layer(module) < 4:
            assert imported not in ENTRY_POINTS, f"{module} imports the entry point {imported}"


@pytest.mark.parametrize("module", modules())
def test_rooms_do_not_look_into_rooms_they_must_not_know(module: str) -> None:
    forbidden = {
        "vlm_sft.data": ("vlm_sft.model",),
        "vlm_sft.model": (
            "vlm_sft.data.text_encoder",
            "vlm_sft.data.record_formats",
            "vlm_sft.data.dataset",
        ),
        "vlm_sft.train": (
            "vlm_sft.model.lora",
            "vlm_sft.data.chat_template",
            "vlm_sft.data.tokenize",
        ),
        "data_tools": ("torch", "transformers", "vlm_sft.model", "vlm_sft.train"),
    }
    for room, secrets in forbidden.items():
        if module == room or module.startswith(room + "."):
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
