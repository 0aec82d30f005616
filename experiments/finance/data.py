"""Daily prices of two share indices and of crude oil, as the package arch carries them."""

from __future__ import annotations

import csv
import gzip
import io
from typing import NamedTuple

import numpy as np

from experiments.harness import packages
from experiments.harness.packages import Archive, Member

ARCH = Archive("arch==8.0.0", "5e9895c2354b9475aff50797ff2191dc64dc5f79602baf0c9321310fb864b637")
FILES = {
    "sp500.csv.gz": Member(
        "arch/data/sp500/sp500.csv.gz",
        "1e028cbb9c400cc018c816ccc439b33c919387e726c3ed5ca2c05c82746059de",
    ),
    "nasdaq.csv.gz": Member(
        "arch/data/nasdaq/nasdaq.csv.gz",
        "b2009535343ebb14e0aa11ed086788d2997a416ffe4f9450eed9a561ae30ac59",
    ),
    "wti.csv.gz": Member(
        "arch/data/wti/wti.csv.gz",
        "b83498894138a65cdc14a67fc1716aa90b3cfda274f976bd3692cc3f1500084d",
    ),
}
MARKETS = ("sp500", "nasdaq", "wti")
AHEAD = {"sp500": 1, "nasdaq": 1, "wti": 5}  # days whose variance is forecast
YEAR = 252  # days of a history
TEST = 0.2  # of all days, the last ones


class Market(NamedTuple):
    """A day's log variance, and the later days' that is forecast from it and those before.

    Attributes:
      x: [T] of each day.
      y: [T] of the days after it; NaN where there are none.
      first_test: day from which on y is held out.
    """

    x: np.ndarray
    y: np.ndarray
    first_test: int

    def days(self, test: bool) -> np.ndarray:
        """Those with a whole history before them and days after them."""
        last = len(self.y) - np.isnan(self.y).sum()
        # What is trained on must not reach into what is held out.
        ahead = len(self.y) - last
        return (
            np.arange(self.first_test, last)
            if test
            else np.arange(YEAR - 1, self.first_test - ahead)
        )


def read(market: str) -> Market:
    """A market's days, fetched by pip into `data/` the first time.

    The share indices have a range for each day: Parkinson's variance, (log high/low)^2 / (4 log 2). Oil
    has closing prices alone: squared returns, of which a week's mean is forecast.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    content = packages.cached(FILES, f"{market}.csv.gz", lambda: packages.sdist_files(ARCH, FILES))
    rows = list(csv.DictReader(io.StringIO(gzip.decompress(content).decode())))
    if market == "wti":
        price = np.array([float(r["DCOILWTICO"]) for r in rows if r["DCOILWTICO"] not in ("", ".")])
        variance = (100 * np.diff(np.log(price))) ** 2
    else:
        high, low = (np.array([float(row[name]) for row in rows]) for name in ("High", "Low"))
        variance = (100 * np.log(high / low)) ** 2 / (4 * np.log(2))
    ahead = AHEAD[market]
    later = np.convolve(variance, np.ones(ahead) / ahead, mode="valid")[1:]
    floor = 1e-4 if ahead == 1 else 1e-2
    y = np.full(len(variance), np.nan)
    y[: len(later)] = np.log(later + floor)
    return Market(np.log(variance + floor), y, int((1 - TEST) * len(y)))
