"""The notebooks run from a clean kernel, and are committed as they ran."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

COLAB = Path(__file__).resolve().parents[2] / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    committed = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in committed), "commit it with its outputs"
    assert not [o for c in committed for o in c.outputs if o.output_type == "error"]
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(COLAB)}},
    )
    client.execute()  # raises what a cell raises


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2
