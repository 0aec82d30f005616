"""Recall: sequences ask for what they hold, and arms compute no more tiles than they may."""

import jax
import numpy as np
import pytest

from experiments.recall import data, experiment


def test_what_is_asked_for_was_said():
    batch = data.draw(np.random.default_rng(0), 8, 128, 12)
    for tokens, target in zip(batch.tokens, batch.target, strict=True):
        said = dict(zip(tokens[0:24:2].tolist(), tokens[1:24:2].tolist(), strict=True))
        assert len(said) == 12
        asked = np.flatnonzero(target >= 0)
        assert asked.tolist() == list(range(104, 128, 2))
        assert [said[tokens[i]] for i in asked] == target[asked].tolist()
        assert np.all(tokens[24:104] >= data.KEYS + data.VALUES)
    with pytest.raises(
        ValueError,
        match="pairs is 33: 132 tokens have room for fewer than 33, and there are 32 keys",
    ):
        data.draw(np.random.default_rng(0), 1, 132, 33)


@pytest.mark.parametrize("part", [0.5, 0.25])
@pytest.mark.parametrize("arm", ["window", "uniform", "ladder"])
def test_an_arm_computes_its_part(arm, part):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 256, 2, 32))
    plan = experiment.ARMS[arm](q, k, v, part)
    every = experiment._tiling(q).num_tiles
    number = np.broadcast_to(np.asarray(plan.count.sum((1, 2))), (2,))
    heads = 2 // plan.count.shape[1]
    assert np.all(number * heads <= int(part * every) * 2)
    assert np.all(number * heads >= 0.9 * int(part * every) * 2)
