"""Every configuration in configs/ loads, its stages fit together, and its plan is in the docs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vlm_sft.config.method import require_stage1, require_stage2
from vlm_sft.config.schema import load_config

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
RUNS = sorted(p for p in CONFIGS.glob("*/*.yaml") if "\nmodel:\n" in p.read_text())
"""Configurations of the trainer; the others are of data_tools."""

SMALL = ("tiny", "demo")
"""Beginnings of folders whose models have random weights or come from `scripts/quickstart`."""

RECIPES = [path for path in RUNS if not path.parent.name.startswith(SMALL)]
DOCUMENT = ROOT / "docs" / "recipes.md"


@pytest.fixture(scope="module")
def plans() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_recipes", ROOT / "scripts/plan_recipes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_recipes"] = module
    spec.loader.exec_module(module)
    return module


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_every_configuration_loads_as_the_stage_of_its_name(path: Path) -> None:
    config = load_config(path)
    assert Path(config.output_dir).name == path.stem
    (require_stage1 if path.stem.startswith("stage1") else require_stage2)(config)
    assert f"configs/{path.parent.name}/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    "path", [path for path in RUNS if path.stem.startswith("stage2")], ids=name_of
)
def test_stage_2_continues_stage_1_of_its_folder(path: Path) -> None:
    first, second = load_config(path.parent / "stage1.yaml"), load_config(path)
    begins = second
    if second.start_from is not None:  # a full run between the two
        begins = load_config(path.parent / f"{Path(second.start_from).parent.name}.yaml")
        assert second.start_from == f"{begins.output_dir}/final"
        assert begins.model.vision_tower == second.model.vision_tower
        assert begins.model.language_model == second.model.language_model
    assert begins.projector == f"{first.output_dir}/final"
    shared = ("vision_tower", "projector_type", "num_queries")
    assert all(getattr(first.model, key) == getattr(second.model, key) for key in shared)
    # As published, stage 1 of LLaVA-NeXT and LLaVA-OneVision has one square per image.
    tiling = first.model.image_tiling
    assert tiling.layout == "none" or tiling == second.model.image_tiling
    assert first.model.language_model.name == second.model.language_model.name
    assert first.model.language_model.config == second.model.language_model.config


def test_every_recipe_says_how_it_is_planned_and_is_in_the_docs(plans: ModuleType) -> None:
    planned = list(plans.recipes())
    assert [recipe.path for recipe in planned] == [name_of(path) for path in RECIPES]
    assert [recipe.arguments.config for recipe in planned] == [name_of(path) for path in RECIPES]
    document = DOCUMENT.read_text()
    assert [
        line.split("`")[1] for line in document.splitlines() if line.startswith("| `configs/")
    ] == [name_of(path) for path in RECIPES]
    folders = {path.parent.name for path in RUNS}
    assert all(f"`{folder}`" in document for folder in folders)


def test_the_table_is_replaced_between_its_marks(plans: ModuleType) -> None:
    text = f"before\n{plans.BEGIN}old\n{plans.END}after\n"
    assert plans.with_table(text, "new\n") == f"before\n{plans.BEGIN}new\n{plans.END}after\n"
    with pytest.raises(plans.UserError, match="needs the lines"):
        plans.with_table("nothing", "new\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RECIPES)), ids=lambda n: name_of(RECIPES[n]))
def test_every_recipe_is_planned_without_downloads_as_the_docs_say(
    number: int, plans: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = list(plans.recipes())[number].row()
    assert row in DOCUMENT.read_text(), "run scripts/plan_recipes.py docs/recipes.md"
