"""Fashion-MNIST, as Debian's package has it, on a grid of cells."""

from __future__ import annotations

import gzip
from typing import NamedTuple

import numpy as np

from experiments.harness import packages

PACKAGE, FOLDER = "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"
SIDE = 32  # pixels: the pictures' 28, and two at each edge
CLASSES = 10


class Pictures(NamedTuple):
    """Gray values in 0..1, and what they show."""

    pixels: np.ndarray  # [B, SIDE, SIDE] float32
    labels: np.ndarray  # [B] int32

    def part(self, number: int) -> Pictures:
        """The first ones."""
        return Pictures(self.pixels[:number], self.labels[:number])


def read(part: str) -> Pictures:
    """The 60,000 of "train" or the 10,000 of "t10k".

    Raises:
      ValueError: a package that cannot be fetched.
    """
    folder = packages.debian_tree(PACKAGE) / FOLDER
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int32)
    return Pictures(np.pad(pixels, ((0, 0), (2, 2), (2, 2))).astype(np.float32) / 255, labels)
