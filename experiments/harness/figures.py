"""Where the figures of README and the documentation come from.

A section names its files in a comment, `<!-- figures: NAME ... -->`: results, by their names in
`docs/results`, a page of results, or code whose constants it quotes, by their paths; or it says
`<!-- figures: arithmetic -->`. A figure is a number with a decimal point, a part, a ratio or a time,
or one in a table behind the first column; it comes from a number in these files that rounds to it and
whose names and settings share a word with what is around the figure; of several, the one that shares
most.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PAGES = ("README.md", "docs/*.md", "docs/how_to/*.md", "docs/notes/*.md", "docs/results/*.md")
# What was tried on the way, of which most can not be run again and has no file.
NOTES = re.compile(r"docs/(notes/.*|method)\.md")
GENERATED = re.compile(r"(Written|Generated) by `")  # a page of a command, made from its results
HEAD = 300  # characters of a page, in which it says so
ARITHMETIC = "arithmetic"
_MARK = re.compile(r"<!-- figures: (.*?) -->", re.S)
_FENCE = re.compile(r"^```.*?^```", re.S | re.M)
_CODE = re.compile(r"^ {4}\S.*?$|`[^`\n]*`|<!--.*?-->|\]\([^)]*\)", re.S | re.M)
_NUMBER = r"\d[\d,]*\d(?:\.\d+)?|\d+(?:\.\d+)?"
_SIZE = r"MB|MiB|GB|GiB|kB|KiB"  # of whole numbers often a setting
_UNIT = rf"%|×|times|ms|µs|us|s|nats|points|minutes|hours|{_SIZE}"
_ELSEWHERE = r"(?<![\w.])(?<![A-Za-z]-)(?<!Python )"  # names, versions
_FIGURE = re.compile(
    rf"{_ELSEWHERE}[-+]?({_NUMBER})(e[-+]?\d+)?(?![\w.]*\d)(?:\s?({_UNIT})(?!\w))?"
)
_WORD = re.compile(r"[a-z]{3,}|\d[\d.,]*\d|\d")
# What a number of a file may be multiplied by: parts as percent, bytes and seconds in other units.
_SCALES = {
    "": (1, 1e-6, 2.0**-20, 100),
    "%": (100, 1),
    "MB": (1e-6, 1),
    "MiB": (2.0**-20, 1),
    "GB": (1e-9, 1),
    "GiB": (2.0**-30, 1),
    "kB": (1e-3, 1),
    "KiB": (2.0**-10, 1),
    "ms": (1e3, 1),
    "µs": (1e6, 1),
    "us": (1e6, 1),
    "minutes": (1 / 60, 1),
    "hours": (1 / 3600, 1),
    "points": (100, 1),
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number on a page, and where it comes from."""

    page: str
    line: int
    text: str
    source: str | None  # file and place in it


def of_pages(root: Path = Path()) -> list[Figure]:
    """All figures of the pages that people write, in their order.

    Raises:
      ValueError: a section names a file that is not there.
    """
    paths = [path for pattern in PAGES for path in sorted(root.glob(pattern))]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    return [
        figure
        for path, text in texts.items()
        if not GENERATED.search(text[:HEAD])
        for figure in of_page(path.relative_to(root).as_posix(), text, root)
    ]


def check(found: Sequence[Figure]) -> None:
    """Prints where each figure comes from, and how many of the notes have no file.

    Raises:
      ValueError: figures of other pages that no file has; it names them.
    """
    without = [x for x in found if x.source is None]
    for x in found:
        if x.source is not None:
            print(f"{x.page}:{x.line}: {x.text} <- {x.source}")
    of_notes = [x for x in without if NOTES.fullmatch(x.page)]
    print(
        f"{len(found) - len(without)} figures of {len(found)} come from a file; {len(of_notes)} of "
        "the notes and the method's trials from none"
    )
    if missing := [f"{x.page}:{x.line}: {x.text}" for x in without if x not in of_notes]:
        raise ValueError("no file has\n" + "\n".join(missing))


def of_page(page: str, text: str, root: Path = Path()) -> Iterator[Figure]:
    """Those of one page."""
    line = 1
    for section in re.split(r"^(?=#+ )", _blank(_FENCE, text), flags=re.M):
        named = [name for mark in _MARK.findall(section) for name in mark.split()]
        files = (_path(name) for name in named if name != ARITHMETIC)
        places = [place for name in files for place in _places(root, name, page)]
        for number, words, figure in _figures(section):
            source = _source(figure, words, places)
            if source is None and ARITHMETIC in named:
                source = f"{ARITHMETIC}, as the section says"
            yield Figure(page, line + number, figure[0].strip(), source)
        line += section.count("\n")


def _path(name: str) -> str:
    return name if "/" in name else f"docs/results/{name}.json"


def _blank(pattern: re.Pattern[str], text: str) -> str:
    """The text without what matches, on the same lines."""
    return pattern.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def _figures(section: str) -> Iterator[tuple[int, set[str], re.Match[str]]]:
    """(line in the section, words around, figure)."""
    title = section.partition("\n")[0] if section.startswith("#") else ""
    header: list[str] = []
    lines = section.splitlines()
    for number, plain in enumerate(_blank(_CODE, section).splitlines()):
        if plain.startswith("#"):
            continue
        if not plain.startswith("|"):
            header = []
            words = _words(title + " ".join(lines[max(0, number - 1) : number + 2]))
            yield from ((number, words, x) for x in _FIGURE.finditer(plain) if _is_measured(x))
            continue
        cells = lines[number].strip("|").split("|")
        if not header:
            header = cells
            continue
        for i, cell in enumerate(plain.strip("|").split("|")[1:], start=1):
            words = _words(f"{title} {cells[0]} {header[min(i, len(header) - 1)]}")
            yield from ((number, words, x) for x in _FIGURE.finditer(cell))


def _is_measured(figure: re.Match[str]) -> bool:
    return "." in figure[1] or bool(figure[2]) or figure[3] not in (None, *_SIZE.split("|"))


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


@dataclasses.dataclass(frozen=True)
class _Place:
    name: str
    value: float
    words: frozenset[str]


def _places(root: Path, name: str, page: str) -> list[_Place]:
    """All numbers of a file."""
    path = root / name
    if not path.is_file():
        raise ValueError(f"{page} names {name} as a source of figures: no such file")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return list(_leaves(json.loads(text), name, frozenset()))
    return [
        _Place(
            f"{name}:{i}",
            float(found[0].replace(",", "").replace("_", "")),
            frozenset(_words(line)),
        )
        for i, line in enumerate(text.splitlines(), start=1)
        for found in re.finditer(r"\d[\d_]*(?:\.\d+)?(?:e-?\d+)?", line)
    ]


def _leaves(node: Any, name: str, words: frozenset[str]) -> Iterator[_Place]:
    """Numbers below a node, with the names above them and the settings beside them."""
    if isinstance(node, bool | None):
        return
    if isinstance(node, int | float):
        yield _Place(name, float(node), words)
    elif isinstance(node, str):
        for found in re.finditer(r"\d+\.\d+|\d+", node):
            yield _Place(name, float(found[0]), words)
    elif isinstance(node, dict):
        beside = " ".join(f"{k} {v}" for k, v in node.items() if isinstance(v, str | int | float))
        below = words | _words(beside)
        for key, value in node.items():
            yield from _leaves(value, f"{name} {key}", below | _words(key))
    else:
        for i, value in enumerate(node):
            yield from _leaves(value, f"{name}[{i}]", words)


def _source(figure: re.Match[str], words: set[str], places: list[_Place]) -> str | None:
    """The place that a figure comes from; None if there is none."""
    digits = figure[1].replace(",", "")
    exponent = figure[2] or ""
    value = float(digits + exponent)
    half = 0.5 * 10.0 ** -len(digits.partition(".")[2]) * float(f"1{exponent}") * (1 + 1e-9)
    scales = _SCALES.get(figure[3] or "", (1,))
    around = words - {figure[1]}
    found = [
        (len(around & place.words), -rank, place.name)
        for place in places
        for rank, scale in enumerate(scales)
        if abs(abs(place.value) * scale - value) <= half and around & place.words
    ]
    return max(found, key=lambda x: x[:2])[2] if found else None
