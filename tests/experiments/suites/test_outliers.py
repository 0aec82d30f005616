"""Outlier channels are there, and the model computes what it did."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.suites.outliers import main, rescaled
from tests.support.small_models import make_context, small_llama

TOKENS = make_context()[None, :40]
logits = nnx.jit(lambda model: model(TOKENS))


@pytest.mark.parametrize("bias", [False, True])
def test_the_logits_are_those_of_the_model_as_it_is(bias):
    model = small_llama(qkv_bias=bias)
    if bias:
        for name in ("query_bias", "key_bias", "value_bias"):
            x = getattr(model.layers, name)
            x[...] = jax.random.normal(jax.random.key(1), x[...].shape)
    before = np.asarray(logits(model))
    after = np.asarray(logits(rescaled(model, 0, 7.0, 2)))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(before, logits(model))


def test_so_many_channels_of_each_head_are_multiplied():
    model = small_llama()
    c, new = model.config, rescaled(model, 0, 8.0, 2)
    for name, number in (("key", 4), ("value", 1)):
        factor = np.asarray(getattr(new.layers, name)[...] / getattr(model.layers, name)[...])
        assert np.ptp(factor, axis=1).max() < 1e-6
        large = np.isclose(factor[:, 0], 8)
        assert np.isclose(factor[:, 0][~large], 1).all()
        assert (large.sum(axis=-1) == number).all()
        if name == "key":  # both of a rotary pair
            first, second = np.split(large, 2, axis=-1)
            np.testing.assert_array_equal(first, second)
    other = rescaled(model, 1, 8.0, 2)
    assert np.any(np.asarray(other.layers.key[...] != new.layers.key[...]))
    assert c.head_dim == 8


@pytest.mark.parametrize(
    ("scale", "pairs", "names"), [(0.0, 1, "scale is 0.0"), (2.0, 5, "pairs is 5: .* 0..4")]
)
def test_what_cannot_be_is_named(scale, pairs, names):
    with pytest.raises(ValueError, match=names):
        rescaled(small_llama(), 0, scale, pairs)


def test_a_model_that_would_undo_it_is_refused():
    with pytest.raises(ValueError, match="normalizes queries and keys"):
        rescaled(small_llama(qk_norm=True), 0, 2.0, 1)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--scale", "two"], "--scale is 'two'"),
        (["--budget", "2"], "--budget is 2.0"),
        (["--policy", "best"], "policy is 'best'"),
        ([], "'no.npz' is no readable"),
    ],
)
@pytest.mark.usefixtures("loaded_once")
def test_bad_arguments_are_one_line(capsys, tmp_path, arguments, names):
    out = str(tmp_path / "out.json")
    assert main(["--cases", "no.npz", "--json", out, *arguments]) == 2
    assert names in capsys.readouterr().err
