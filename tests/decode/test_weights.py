"""Weights in a few bits: the nearest codes, exact bytes, a model that decodes as with them decoded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import decode
from jbalance.decode import weights
from jbalance.decode.memory import dense_log_probs
from tests.decode.conftest import PROMPT
from tests.support.small_models import VOCAB

CODED = 64 * (128 + 64 + 64 + 128 + 3 * 128)  # weights of a layer that become codes
TOKENS = PROMPT[:100]


def relative(got, x):
    """Squared error of each group over its squares."""
    got, x = (np.asarray(y, np.float64).reshape(-1, 64) for y in (got, x))
    return ((got - x) ** 2).sum(axis=1) / np.maximum((x**2).sum(axis=1), 1e-300)


@pytest.mark.parametrize("bits", weights.BITS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_codes_are_whole_steps_that_keep_products(bits, dtype):
    rng = np.random.default_rng(bits)
    x = rng.standard_t(4, (3, 2, 128)).astype(np.float32) * np.float32(0.02)
    x[0, 0, :64] = 0
    x[1, 1, 5] = 3.0  # an outlier of its group
    x = np.asarray(jnp.asarray(x, dtype))
    codes = weights.quantized("x", jnp.asarray(x), bits)
    assert sum(y.nbytes for y in jax.tree.leaves(codes)) == x.size * (bits + 0.25) / 8
    got = codes.decoded()
    assert (got.shape, got.dtype) == (x.shape, dtype)
    groups = np.asarray(x, np.float64).reshape(-1, 64)
    values = np.asarray(got, np.float64).reshape(-1, 64)
    assert not values[0].any()  # zeros are zeros
    steps = values / np.asarray(codes.scale, np.float64).reshape(-1, 1)
    rounded = 2.0 ** (bits - 8) if dtype == jnp.bfloat16 else 1e-3
    assert np.abs(steps - np.round(steps)).max() < rounded
    assert steps.min() > -(2 ** (bits - 1)) - rounded
    assert steps.max() < 2 ** (bits - 1) - 1 + rounded
    along = (groups * values).sum(axis=1)[1:] / (groups**2).sum(axis=1)[1:]
    np.testing.assert_allclose(along, 1, atol=2.0**-7)


def test_errors_are_near_those_of_the_best_uniform_quantizers():
    """Of Gaussian weights 0.0374, 0.01154, 0.00349 at 3, 4 and 5 bits (Max, IRE Trans. Inf. Theory 6,
    1960), with one range for all groups; products that are kept cost its square more."""
    x = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    errors = [
        relative(weights.quantized("x", jnp.asarray(x), bits).decoded().T, x.T).mean()
        for bits in weights.BITS
    ]
    np.testing.assert_array_less(errors, [0.0374 * 1.04, 0.01154, 0.00349, 7e-5, 1e-8])


def test_groups_lie_along_the_axes_that_products_sum():
    """A column of an input kernel, or of an output kernel over heads, that is loud spoils no other."""
    rng = np.random.default_rng(0)
    for shape in ((64, 3, 16), (4, 16, 40)):
        x = rng.normal(size=shape).astype(np.float32)
        x[..., 0] *= 1000
        got = np.asarray(weights.quantized("x", jnp.asarray(x), 4).decoded())
        assert (np.abs(got - x)[..., 1:]).max() < 0.6


@pytest.mark.parametrize("bits", weights.BITS)
def test_rows_and_parts_of_a_table_are_those_of_the_whole(bits):
    x = np.random.default_rng(0).normal(size=(10, 2, 64)).astype(np.float32)
    x[3] *= 1000  # a row is a row's own
    codes = weights.quantized("x", jnp.asarray(x), bits, rows=True)
    whole = np.asarray(codes.decoded())
    assert relative(whole, x).max() < 0.08
    at = np.array([[7, 0], [7, 9]])
    np.testing.assert_array_equal(codes.rows(jnp.asarray(at)), whole[at])
    np.testing.assert_array_equal(codes.part(jnp.int32(4), 3).decoded(), whole[4:7])


def test_bytes_are_exact_and_what_has_no_groups_stays(grouped):
    small = decode.quantize_weights(grouped, [3, None, 8], 4)
    saved = sum(CODED * (4 - (bits + 0.25) / 8) for bits in (3, 8))
    saved += VOCAB * 64 * (4 - 4.25 / 8)
    assert small.nbytes == grouped.nbytes - saved
    kept = jax.tree.leaves(small.layers[1])
    for x, y in zip(kept, grouped.layers[1], strict=True):
        np.testing.assert_array_equal(x, y)


def test_it_decodes_as_the_model_with_its_weights_decoded(grouped, monkeypatch):
    """In parts of the vocabulary that do not divide it, by prompts, steps and dense attention."""
    monkeypatch.setattr(weights, "_PART", 16)
    small = decode.quantize_weights(grouped, [3, 4, 5], 5)
    same = dataclasses.replace(
        grouped, params=weights.decoded(small.params), layers=weights.decoded(small.layers)
    )
    got, want = (dense_log_probs(x, TOKENS, 50) for x in (small, same))
    np.testing.assert_allclose(got, want, atol=2e-5)
    away = float(jnp.abs(want - dense_log_probs(grouped, TOKENS, 50)).max())
    assert away > 1e-2  # fewer bits are something else
    budget = [grouped.dense_bytes(160) * 2]
    tokens = [decode.generate(x, [TOKENS], budget, max_new_tokens=12) for x in (small, same)]
    np.testing.assert_array_equal(*tokens)


def test_layers_of_one_kind_share_their_programs(grouped):
    small = decode.quantize_weights(grouped, 4)
    assert len({small.functions(i) for i in range(3)}) == 1
    trees = {jax.tree.structure(x) for x in small.layers}
    assert len(trees) == 1


class Mixed:
    """Functions that look at more of a table than the rows of their tokens."""

    def embed(self, params, tokens, positions):
        return params[0][tokens] - params[0].mean(axis=0)

    def logits(self, params, x):
        return jax.nn.log_softmax(x @ params[0].T)


def test_tables_that_are_looked_at_as_wholes_are_refused(grouped, monkeypatch):
    monkeypatch.setattr(weights, "_PART", 16)
    table = (jnp.asarray(np.random.default_rng(0).normal(size=(VOCAB, 64)), jnp.float32),)
    mixed = Mixed()
    odd = dataclasses.replace(grouped, params=table, embed=mixed.embed, logits=grouped.logits)
    odd = dataclasses.replace(odd, logits=lambda params, x: x @ params[0].T)
    with pytest.raises(ValueError, match=r"table_bits: model\.embed is not the rows"):
        decode.quantize_weights(odd, None, 8)
    odd = dataclasses.replace(
        grouped,
        params=table,
        embed=lambda params, tokens, where: params[0][tokens],
        logits=mixed.logits,
    )
    with pytest.raises(ValueError, match=r"table_bits: model\.logits are not those of each row"):
        decode.quantize_weights(odd, None, 8)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ((6,), r"layer_bits\[0\] is 6: it must be one of \(3, 4, 5, 8, 16\)"),
        (([4, 4],), "layer_bits has 2 entries for 3 layers"),
        (([4, 4, "4"],), r"layer_bits\[2\] is '4'"),
        ((4, 32), "table_bits is 32"),
        ((True,), r"layer_bits\[0\] is True"),
        ((4.0,), "layer_bits"),
    ],
)
def test_bad_bits_are_named(grouped, given, names):
    with pytest.raises(ValueError, match=names):
        decode.quantize_weights(grouped, *given)


def test_models_that_cannot_be_quantized_are_named(grouped):
    small = decode.quantize_weights(grouped, 4)
    with pytest.raises(ValueError, match=r"model\.layers is quantized already"):
        decode.quantize_weights(small, 4)
    first = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), grouped.layers[0])
    with pytest.raises(ValueError, match=r"model\.layers\[0\] has a matrix .* not finite"):
        decode.quantize_weights(
            dataclasses.replace(grouped, layers=(first, *grouped.layers[1:])), 4
        )
