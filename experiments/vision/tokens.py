"""Tokens of a picture at two resolutions, what each is worth, and which of them a budget keeps.

A cell of 8 x 8 pixels is shown by one coarse token (its 4 x 4 means) or by four fine ones of 4 x 4
pixels: levels of 1 and 4 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.vision.data import CLASSES, SIDE, Pictures
from jbalance import allocate, importance, shares

PATCH, CELL = 4, 8
ACROSS = SIDE // CELL
CELLS = ACROSS**2
FINE = (SIDE // PATCH) ** 2  # tokens of a picture that is shown whole
PLACES = FINE + CELLS  # of fine tokens, then of coarse ones
COSTS = (1, 4)
SCORED = 4000  # pictures that the pixels' importance is learned from
_BINS = 8  # gray levels of the pixels' scores


class Worth(NamedTuple):
    """What pixels are worth, learned from the training part.

    Attributes:
      w: [SIDE, SIDE] importance, METHOD section 1: relevance, discrimination and complexity.
      mean: [SIDE, SIDE] gray value; what a model must take a cell for that it is not shown.
    """

    w: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, known: Pictures) -> Worth:
        flat = known.pixels[:SCORED].reshape(-1, SIDE * SIDE)
        y = known.labels[:SCORED]
        score = importance.feature_importance(np.round(flat * _BINS), y, num_classes=CLASSES)
        return cls(np.asarray(score).reshape(SIDE, SIDE), known.pixels.mean(axis=0))


def cells(x: np.ndarray, size: int) -> np.ndarray:
    """[B, SIDE, SIDE] -> [B, squares, size * size], squares of so many pixels, row by row."""
    across = SIDE // size
    split = x.reshape(-1, across, size, across, size).swapaxes(2, 3)
    return split.reshape(-1, across**2, size * size)


def coarse(pixels: np.ndarray) -> np.ndarray:
    """[B, SIDE, SIDE] -> the same with every 2 x 2 pixels at their mean."""
    halved = pixels.reshape(-1, SIDE // 2, 2, SIDE // 2, 2).mean(axis=(2, 4))
    return halved.repeat(2, axis=1).repeat(2, axis=2)


def values(pixels: np.ndarray, worth: Worth) -> np.ndarray:
    """[B, CELLS, 2] what a cell's levels tell beyond its coarse token: weighted squares of details.

    As parts of what the picture tells, or pictures of high contrast would have the tokens of others.
    """
    details = cells(worth.w * (pixels - coarse(pixels)) ** 2, CELL).sum(-1)
    part = details / _of_pictures(cells(worth.w * (pixels - worth.mean) ** 2, CELL).sum(-1))
    return np.stack([np.zeros_like(part), part], axis=-1).astype(np.float32)


def of_patches(pixels: np.ndarray, worth: Worth) -> np.ndarray:
    """[B, FINE] what each fine token tells, as a part of its picture."""
    told = cells(worth.w * (pixels - worth.mean) ** 2, PATCH).sum(-1)
    return told / _of_pictures(told)


def _of_pictures(told: np.ndarray) -> np.ndarray:
    """[B, 1] sums over a picture."""
    return np.maximum(told.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)


# An arm: pictures, worth, tokens of all of them together -> [B, PLACES], which tokens are kept.
Arm = Callable[[np.ndarray, Worth, int], np.ndarray]


def full(pixels: np.ndarray, worth: Worth, total: int) -> np.ndarray:
    """Every fine token."""
    del worth, total
    return _kept(np.ones((len(pixels), FINE), bool))


def uniform(pixels: np.ndarray, worth: Worth, total: int) -> np.ndarray:
    """The same fine tokens of every picture, evenly over the plane."""
    del worth
    number = total // len(pixels)
    row, column = np.divmod(np.arange(FINE), SIDE // PATCH)
    # Bit-reversed order of rows and columns: the first k are spread for any k.
    order = np.argsort(_spread(row ^ column) * (SIDE // PATCH) + _spread(row), kind="stable")
    mask = np.zeros(FINE, bool)
    mask[order[:number]] = True
    return _kept(np.broadcast_to(mask, (len(pixels), FINE)))


def proportional(pixels: np.ndarray, worth: Worth, total: int) -> np.ndarray:
    """Each picture's share is that of its importance, alpha = w / sum w; in it the best fine tokens."""
    scored = of_patches(pixels, worth)
    alpha = shares.proportional(scored.sum(axis=1).astype(np.float32))
    amount = np.asarray(allocate.whole(alpha, total, 1, FINE).amount)
    rank = np.argsort(np.argsort(-scored, axis=1, kind="stable"), axis=1)
    return _kept(rank < amount[:, None])


def ladder(pixels: np.ndarray, worth: Worth, total: int) -> np.ndarray:
    """One price for the levels of all cells of all pictures."""
    steps = values(pixels, worth).reshape(-1, len(COSTS))
    out = allocate.ladder(jnp.asarray(steps), jnp.asarray(COSTS), jnp.asarray(total))
    fine = np.array(out.level == 1).reshape(-1, CELLS)
    return np.concatenate([_of_cells(fine), ~fine], axis=1)


ARMS: dict[str, Arm] = {
    "full": full,
    "uniform": uniform,
    "proportional": proportional,
    "ladder": ladder,
}


def budgeted(
    pictures: Pictures, worth: Worth, arm: str, part: float, chunk: int
) -> list[dict[str, np.ndarray]]:
    """The tokens of each picture that `part` of all fine tokens pays for, chunk by chunk of pictures."""
    found = []
    for start in range(0, len(pictures.labels), chunk):
        pixels = pictures.pixels[start : start + chunk]
        kept = ARMS[arm](pixels, worth, int(part * FINE * len(pixels)))
        halved = pixels.reshape(-1, SIDE // 2, 2, SIDE // 2, 2).mean(axis=(2, 4))
        shown = np.concatenate([cells(pixels, PATCH), _small_cells(halved)], axis=1)
        found += [
            {"pixels": own[mask], "place": np.flatnonzero(mask).astype(np.int32)}
            for own, mask in zip(shown, kept, strict=True)
        ]
    return found


def _small_cells(halved: np.ndarray) -> np.ndarray:
    """[B, SIDE/2, SIDE/2] -> [B, CELLS, PATCH * PATCH]."""
    split = halved.reshape(-1, ACROSS, PATCH, ACROSS, PATCH).swapaxes(2, 3)
    return split.reshape(-1, CELLS, PATCH * PATCH)


def _kept(fine: np.ndarray) -> np.ndarray:
    return np.concatenate([fine, np.zeros((len(fine), CELLS), bool)], axis=1)


def _of_cells(x: np.ndarray) -> np.ndarray:
    """[B, CELLS] -> [B, FINE], every fine token as its cell."""
    grid = x.reshape(-1, ACROSS, ACROSS).repeat(CELL // PATCH, axis=1).repeat(CELL // PATCH, axis=2)
    return grid.reshape(-1, FINE)


def _spread(x: np.ndarray) -> np.ndarray:
    """Numbers of three bits with the order of their bits reversed."""
    return (x & 1) << 2 | (x & 2) | (x & 4) >> 2
