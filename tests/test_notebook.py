"""The notebook runs from its first cell to its last, and is committed without outputs."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quick_tour.ipynb"


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.slow
def test_the_notebook_trains_answers_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    printed = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output["output_type"] == "stream" and output["name"] == "stdout"
    )
    assert "⟦red<|im_end|>⟧" in printed
    (folder,) = tmp_path.glob("quick-tour-*")
    assert (folder / "comparison.html").stat().st_size > 10_000
    scores = json.loads((folder / "evaluation" / "results.json").read_text())["tasks"]["color"]
    right, blank = (scores["conditions"][name]["accuracy"] for name in ("right", "blank"))
    assert right > blank  # the model looks at the image
