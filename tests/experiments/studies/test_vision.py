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


def test_values_are_details_that_the_coarse_token_does_not_show():
    pictures, worth = some()
    value = tokens.values(pictures.pixels, worth).astype(float)
    whole = (worth.w * pictures.pixels.astype(float) ** 2).sum(axis=(1, 2))
    value *= whole[:, None, None]
    for picture, cell in itertools.product(range(NUMBER), range(CELLS)):
        row, column = (8 * x for x in divmod(cell, 4))
        lost = 0.0
        for y, x in itertools.product(range(row, row + 8), range(column, column + 8)):
            top, left = y // 2 * 2, x // 2 * 2
            mean = pictures.pixels[picture, top : top + 2, left : left + 2].astype(float).mean()
            lost += worth.w[y, x] * (float(pictures.pixels[picture, y, x]) - mean) ** 2
        np.testing.assert_allclose(value[picture, cell], [0, lost], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", [0.5, 0.25])
@pytest.mark.parametrize("arm", list(tokens.ARMS))
def test_a_budget_is_spent_and_never_exceeded(arm, part):
    pictures, worth = some()
    kept = tokens.budgeted(pictures, worth, arm, part, NUMBER)
    total = sum(len(x["place"]) for x in kept)
    room = int(part * FINE * NUMBER)
    if arm == "full":
        assert total == FINE * NUMBER
    else:
        assert room - COSTS[-1] < total <= room
    assert min(len(x["place"]) for x in kept) >= 1


def test_tokens_show_their_pixels():
    pictures, worth = some()
    whole, small = (
        tokens.budgeted(pictures, worth, arm, part, NUMBER)[3]
        for arm, part in (("full", 1.0), ("ladder", 0.25))
    )
    place = 8 * 3 + 5  # the fourth row of patches, the sixth in it
    np.testing.assert_array_equal(
        whole["pixels"][place].reshape(4, 4), pictures.pixels[3, 12:16, 20:24]
    )
    cell = 4 * 1 + 2
    blocks = pictures.pixels[3, 8:16, 16:24].reshape(4, 2, 4, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(small["pixels"][cell].reshape(4, 4), blocks, rtol=1e-6)
    assert small["place"][cell] == FINE + cell


def test_the_ladder_shows_every_cell_and_nothing_in_detail_that_is_empty():
    pictures, worth = some()
    for x in tokens.budgeted(pictures, worth, "ladder", 0.5, NUMBER):
        fine, rough = x["place"][x["place"] < FINE], x["place"][x["place"] >= FINE] - FINE
        of_fine = set((fine // 16 * 4 + fine % 8 // 2).tolist())
        assert of_fine | set(rough.tolist()) == set(range(CELLS))
        assert not of_fine & set(rough.tolist())
        assert set(range(4)) <= set(rough.tolist())  # the first row of cells is empty
