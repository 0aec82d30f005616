"""Figures on pages are found in the files that their sections name, or missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.harness import figures

ROOT = Path(__file__).resolve().parents[3]
PAGE = """# Speed

Half of the tiles take 0.52 of the time, 3 ms and 41 % of the memory (`0.99` is code, 2048 a size).
<!-- figures: out/it.json -->

| bytes | ours | theirs |
| --- | --- | --- |
| 25 % | 0.0123 | 16 |

## Other

It was 7.7 times as fast.
"""
RESULTS = {
    "rows": [
        {"policy": "theirs", "kl": 0.01234, "found": 16},
        {"policy": "ours", "kl": 0.0123, "found": 15},
        {"case": "time", "value": 0.5151},
        {"case": "seconds", "value": 0.00304, "memory": 0.4149},
        {"case": "unfit", "value": True},
    ]
}


def found_in(page: str, root: Path) -> dict[str, str | None]:
    (root / "out").mkdir(exist_ok=True)
    (root / "out" / "it.json").write_text(json.dumps(RESULTS))
    return {x.text: x.source for x in figures.of_page("page.md", page, root)}


def test_each_figure_has_the_place_that_is_most_like_it(tmp_path):
    it = "out/it.json rows"
    assert found_in(PAGE, tmp_path) == {
        "0.52": f"{it}[2] value",
        "3 ms": f"{it}[3] value",
        "41 %": f"{it}[3] memory",
        "0.0123": f"{it}[1] kl",  # not [0], which rounds to it too
        "16": f"{it}[0] found",
        "7.7 times": None,  # the section names no file
    }


@pytest.mark.parametrize(
    ("figure", "other"), [("0.52", "0.53"), ("16", "17"), ("0.0123", "0.0124")]
)
def test_a_figure_that_is_in_no_file_is_without(figure, other, tmp_path):
    assert found_in(PAGE.replace(figure, other), tmp_path)[other] is None


def test_a_number_of_something_else_is_none_of_its_places(tmp_path):
    page = "Whales weigh 0.0123.\n<!-- figures: ./out/it.json -->\n"
    assert found_in(page, tmp_path) == {"0.0123": None}


def test_lines_are_those_of_the_page(tmp_path):
    found_in(PAGE, tmp_path)
    for figure in figures.of_page("page.md", PAGE, tmp_path):
        assert figure.text in PAGE.splitlines()[figure.line - 1]


def test_constants_of_code_have_their_line(tmp_path):
    (tmp_path / "its").mkdir()
    (tmp_path / "its" / "code.py").write_text("A = 1\nRIDGE = 0.05  # of the mean\n")
    page = "The ridge is 0.05.\n<!-- figures: its/code.py -->\n"
    assert found_in(page, tmp_path) == {"0.05": "its/code.py:2"}


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"page\.md names out/gone\.json"):
        found_in("It is 0.5.\n<!-- figures: out/gone.json -->\n", tmp_path)


def test_a_name_alone_is_of_the_results(tmp_path):
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "it.json").write_text('{"mean": {"kl": 0.5}}')
    page = "The mean is 0.5.\n<!-- figures: it -->\n"
    assert found_in(page, tmp_path) == {"0.5": "docs/results/it.json mean kl"}


def test_arithmetic_is_said_to_be_that(tmp_path):
    (figure,) = figures.of_page("page.md", "30 x 0.5 ms.\n<!-- figures: arithmetic -->\n", tmp_path)
    assert figure.source == "arithmetic, as the section says"


@pytest.fixture(scope="module")
def all_pages():
    return figures.of_pages(ROOT)


@pytest.mark.parametrize("pattern", figures.PAGES)
def test_every_figure_of_the_pages_has_a_file(pattern, all_pages):
    without = [
        f"{x.page}:{x.line}: {x.text}"
        for x in all_pages
        if x.source is None and Path(x.page).match(pattern) and not figures.NOTES.fullmatch(x.page)
    ]
    assert without == []
