"""The wheel, built from the sdist, has every module and every data file of the packages."""

import zipfile
from pathlib import Path

import check_wheel
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return check_wheel.build(ROOT, tmp_path_factory.mktemp("dist"))[1]


def test_the_wheel_has_all_files_of_the_packages_and_no_others(wheel: Path) -> None:
    assert check_wheel.content_faults(wheel, ROOT) == []
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"vlm_sft/py.typed", "data_tools/py.typed", "vlm_sft/configs/tiny/stage1.yaml"} <= names


def test_a_file_that_is_lost_or_added_is_noticed(wheel: Path, tmp_path: Path) -> None:
    other = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(other, "w") as after:
        for name in before.namelist():
            if name != "vlm_sft/serving/static/index.html":
                after.writestr(name, before.read(name))
        after.writestr("tests/secret.txt", "")
    assert check_wheel.content_faults(other, ROOT) == [
        "the wheel lacks vlm_sft/serving/static/index.html",
        "the wheel has tests/secret.txt besides",
    ]
