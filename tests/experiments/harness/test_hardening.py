"""The page of hardening is that of its file, and the tests that it names are there."""

import json
from pathlib import Path

import pytest

from experiments.harness import hardening
from tests.support.together import ROOT


def test_the_page_is_that_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = hardening.write(page=tmp_path / "page.md")
    assert page.read_text() == (ROOT / hardening.PAGE).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("defects"), "defects must be a list"),
        (lambda data: data["remains"].append({}), "remains must be a list"),
        (lambda data: data["faults"][0].update(test="tests/x.py::test_y"), "no test tests/x.py"),
        (lambda data: data["faults"][0].update(fault="Z1 x"), "'Z1 x' begins with none of A, B"),
        (lambda data: data["defects"][0].update(test="tests/x.py::test_x"), "no test tests/x.py"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(ROOT)
    data = json.loads(Path(hardening.DATA).read_text())
    change(data)
    path = tmp_path / "hardening.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        hardening.write(path, tmp_path / "page.md")
