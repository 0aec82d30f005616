"""Vision's tokens: what levels are worth, by brute force, and what a budget keeps."""

import itertools

import numpy as np
import pytest

from experiments.vision import tokens
from experiments.vision.data import SIDE, Pictures
from experiments.vision.tokens import CELLS, COSTS, FINE, Worth

NUMBER = 6


def some():
    rng = np.random.default_rng(0)
    pixels = rng.random((NUMBER, SIDE, SIDE)).astype(np.float32)
    pixels[:, :8] = 0  # nothing to see in the first row of cells
    worth = Worth(rng.random((SIDE, SIDE)), np.zeros((SIDE, SIDE)))
    return Pictures(pixels, np.arange(NUMBER, dtype=np.int32)), worth


def test_values_are_the_squares_that_are_no_longer_guessed():
    pictures, worth = some()
    value = tokens.values(pictures.pixels, worth).astype(float)
    whole = (worth.w * pictures.pixels.astype(float) ** 2).sum(axis=(1, 2))
    value *= whole[:, None, None]
    for picture, cell in itertools.product(range(NUMBER), range(CELLS)):
        row, column = (8 * x for x in divmod(cell, 4))
        lost = {"none": 0.0, "coarse": 0.0}
        for y, x in itertools.product(range(row, row + 8), range(column, column + 8)):
            top, left = y // 2 * 2, x // 2 * 2
            mean = pictures.pixels[picture, top : top + 2, left : left + 2].astype(float).mean()
            own = float(pictures.pixels[picture, y, x])
            lost["none"] += worth.w[y, x] * own**2
            # A mean that lies farther off than the guess tells nothing.
            lost["coarse"] += worth.w[y, x] * min((own - mean) ** 2, own**2)
        want = [0, lost["none"] - lost["coarse"], lost["none"]]
        np.testing.assert_allclose(value[picture, cell], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", [0.5, 0.25])
@pytest.mark.parametrize("arm", list(tokens.ARMS))
def test_a_budget_is_spent_and_never_exceeded(arm, part):
    pictures, worth = some()
    kept = tokens.budgeted(pictures, worth, arm, part, NUMBER)
    total = sum(len(x["place"]) for x in kept)
    room = int(part * FINE * NUMBER)
    if arm == "full":
        assert total == FINE * NUMBER
    elif arm == "coarse":
        assert total == CELLS * NUMBER
    else:
        assert room - COSTS[-1] < total <= room
    assert min(len(x["place"]) for x in kept) >= 1


def test_tokens_show_their_pixels():
    pictures, worth = some()
    whole, small = (
        tokens.budgeted(pictures, worth, arm, 1.0, NUMBER)[3] for arm in ("full", "coarse")
    )
    place = 8 * 3 + 5  # the fourth row of patches, the sixth in it
    np.testing.assert_array_equal(
        whole["pixels"][place].reshape(4, 4), pictures.pixels[3, 12:16, 20:24]
    )
    cell = 4 * 1 + 2
    blocks = pictures.pixels[3, 8:16, 16:24].reshape(4, 2, 4, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(small["pixels"][cell].reshape(4, 4), blocks, rtol=1e-6)
    assert small["place"][cell] == FINE + cell


def test_the_ladder_shows_nothing_of_what_is_empty():
    pictures, worth = some()
    for x in tokens.budgeted(pictures, worth, "ladder", 0.5, NUMBER):
        fine = x["place"][x["place"] < FINE]
        assert not np.any(fine < 2 * 8)  # two rows of patches are the first row of cells
        assert not np.any((x["place"] >= FINE) & (x["place"] < FINE + 4))
