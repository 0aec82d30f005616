"""Texts with questions that they answer, and chapters with summaries by their authors."""

from __future__ import annotations

import gzip
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from experiments.harness import packages

JARGON = "jargon-text"
JARGON_FILE = "usr/share/doc/jargon-text/jargon.txt.gz"
ENTRY = re.compile(
    r"^   :(?P<term>[^:\n]+):(?P<head>[^\n]*)\n(?P<body>.*?)(?=^   :[^:\n]+:|^\S)", re.M | re.S
)
FEWEST_WORDS, MOST_WORDS = 16, 90  # of a definition
HANDBOOK = "debian-handbook"
HANDBOOK_FOLDER = "usr/share/doc/debian-handbook/html/en-US"
SUMMARY, BOX, TITLE_PAGE = "highlights", "sidebar", "toc"


class Entry(NamedTuple):
    """Of a glossary."""

    term: str
    definition: str


class Chapter(NamedTuple):
    """Of a book."""

    title: str
    summary: str  # that its authors put before it
    text: str  # without it


def entries() -> list[Entry]:
    """The Jargon File's entries of some sentences, in its order.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    path = packages.debian_tree(JARGON) / JARGON_FILE
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = file.read()
    found = {}
    for match in ENTRY.finditer(text):
        definition = " ".join(re.sub(r"[{}]", "", match["body"]).split())
        if FEWEST_WORDS <= len(definition.split()) <= MOST_WORDS:
            found[match["term"]] = Entry(match["term"], definition)
    return list(found.values())


def chapters() -> list[Chapter]:
    """The Debian Administrator's Handbook, each chapter with the sections that its pages link.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    folder = packages.debian_tree(HANDBOOK) / HANDBOOK_FOLDER
    found = []
    for path in sorted(folder.glob("*.html")):
        page = _page(path)
        if not path.name.startswith("sect.") and page.summary:
            sections = [_page(folder / name) for name in page.sections]
            text = " ".join([page.text, *(section.text for section in sections)])
            found.append(Chapter(page.title, page.summary, text))
    return found


def sentences(text: str) -> list[str]:
    """A text cut behind its full stops, question and exclamation marks."""
    return [x for x in re.split(r"(?<=[.!?])\s+(?=[A-Z\"“])", text) if x]


def _page(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


class _Page(HTMLParser):
    """The paragraphs of a page: those of its summary, and the others; boxes and code are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.title, self.sections = "", dict[str, None]()
        self._paragraphs: dict[str, list[str]] = {SUMMARY: [], "": []}
        self._open: list[tuple[str, str]] = []  # tags and their classes
        self._in: str | None = None  # a paragraph, of which kind

    @property
    def summary(self) -> str:
        return _joined(self._paragraphs[SUMMARY])

    @property
    def text(self) -> str:
        return _joined(self._paragraphs[""])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        around = {kind for _, kind in self._open}
        if tag == "a" and TITLE_PAGE in around and given.get("href", "").startswith("sect."):
            self.sections[given["href"].split("#")[0]] = None
        if tag not in ("br", "img", "hr", "meta", "link", "input", "col"):
            self._open.append((tag, given.get("class", "")))
        if (tag == "p" or given.get("class") == "para") and BOX not in around:
            self._in = SUMMARY if SUMMARY in around else ""
            self._paragraphs[self._in].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass
        if not any(name == "p" or kind == "para" for name, kind in self._open):
            self._in = None

    def handle_data(self, data: str) -> None:
        tags = [name for name, _ in self._open]
        if "title" in tags:
            self.title += data
        kinds = [kind for _, kind in self._open]
        if self._in is not None and BOX not in kinds and "pre" not in tags:
            self._paragraphs[self._in][-1] += data


def _joined(paragraphs: list[str]) -> str:
    return " ".join(" ".join(paragraphs).split())
