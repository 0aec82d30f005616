"""The notebooks run from a clean kernel, and are committed as they ran."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
COLAB = ROOT / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))
TRAINING = [path for path in NOTEBOOKS if "NOTEBOOK_STEPS" in path.read_text(encoding="utf-8")]
FEW_STEPS = 30
# Of the real model, of eight devices or of several tasks, which take long to compile.
LONG = (
    "experiments.models.load",
    "experiments.compiled.measure",
    "sharded.cache.create",
    "multitask.aggregator",
)
MARKS = {
    path: pytest.mark.slow
    for path in NOTEBOOKS
    if any(name in path.read_text(encoding="utf-8") for name in LONG)
}


def run(path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(COLAB)}},
    )
    client.execute()  # raises what a cell raises


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    committed = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in committed), "commit it with its outputs"
    assert not [o for c in committed for o in c.outputs if o.output_type == "error"]


@pytest.mark.parametrize(
    "path",
    [pytest.param(x, marks=MARKS.get(x, ()), id=x.stem) for x in NOTEBOOKS],
)
def test_a_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_STEPS", str(FEW_STEPS))
    run(path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_notebook_trains_as_long_as_it_says(path, monkeypatch):
    run(path, monkeypatch)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2
    assert TRAINING
    numbers = [int(path.stem.split("_")[0]) for path in NOTEBOOKS]
    assert numbers == list(range(1, len(NOTEBOOKS) + 1))


def test_the_start_page_lists_the_notebooks():
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\d\d_\w+)` \|", page, re.M) == [path.stem for path in NOTEBOOKS]
