"""The notebook runs, as it stands, in a kernel."""

from pathlib import Path

import pytest
from patience import PATIENCE

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.exhaustive
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    nbclient, nbformat = map(pytest.importorskip, ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # nobody would renew them
    nbclient.NotebookClient(
        notebook,
        timeout=PATIENCE,
        kernel_name="python3",
        resources={"metadata": {"path": tmp_path}},
    ).execute()
    assert list(tmp_path.glob("runs/simclr-*/**/summary.json"))
    said = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    errors = [output for output in said if "error" in (output["output_type"], output.get("name"))]
    assert not errors
    texts = [output["text"] for output in said if output.get("name") == "stdout"]
    assert "did you mean method.temperature?" in "".join(texts)
