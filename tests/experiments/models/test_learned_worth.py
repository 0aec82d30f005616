"""What was learned of a model is found again, whatever its weights were rounded to, and of no other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.harness import files
from experiments.models import worth
from jbalance import decode


def changed(model, change):
    """The model with all its floats changed, but for what is not trained."""
    own = nnx.clone(model)
    nnx.update(own, jax.tree.map(change, nnx.state(own, nnx.Param)))
    return own


@pytest.fixture(scope="module")
def model(smollm2):
    return smollm2[1]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_rounded_model_is_the_same(model, dtype):
    found = worth.learned_of(changed(model, lambda x: x.astype(dtype)))
    assert found is not None
    assert found is worth.learned_of(model)


def test_another_model_is_none(model):
    assert worth.learned_of(changed(model, lambda x: x * 1.001)) is None
    assert worth.learned_of(changed(model, lambda x: x.at[..., 0].add(0.2))) is None


WRITTEN = {
    **{name: np.ones((2, 3), np.float16) for name in decode.WorthWeights._fields},
    "layers": np.array([0, 2]),
    "num_layers": np.int64(3),
    "means_of_norms": np.ones(7, np.float32),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": None}, "lacks the array 'bias'"),
        ({"hidden": np.full((2, 3), np.nan, np.float16)}, "'hidden' holds numbers that are not"),
        ({"features": np.ones((1, 3), np.float16)}, r"'features' has shape \[1, 3\]"),
        ({"layers": np.array([0, 3])}, r"layers are \[0, 3\] of 3"),
        ({"layers": np.array([0.0, 2.0])}, "'layers' has the type float64"),
        ({"num_layers": np.int64(4)}, r"means_of_norms has shape \[7\]"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, changes, message):
    path = tmp_path / "it.npz"
    files.write_npz(path, WRITTEN)
    assert len(worth.read(path)[1]) == 3
    files.write_npz(path, {k: x for k, x in (WRITTEN | changes).items() if x is not None})
    with pytest.raises(ValueError, match=f"it.npz.*{message}"):
        worth.read(path)


def test_what_is_written_is_read_again(model, tmp_path):
    found = worth.learned_of(model)
    worth.write(tmp_path / "it.npz", model, found)
    means, again = worth.read(tmp_path / "it.npz")
    np.testing.assert_array_equal(means, worth.means_of_norms(model))
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(x, y)
