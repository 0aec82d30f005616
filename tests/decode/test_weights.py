"""Weights in a few bits: the nearest codes, exact bytes, a model that decodes as with them decoded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jbalance import adapters, decode
from jbalance.decode import weights
from jbalance.decode.memory import dense_log_probs
from tests.decode.conftest import PROMPT
from tests.support.small_models import VOCAB, small_llama

SIZES = {"embed_dim": 64, "hidden_dim": 128, "num_heads": 8, "num_kv_heads": 4, "head_dim": 16}
CODED = 64 * (128 + 64 + 64 + 128 + 3 * 128)  # weights of a layer that become codes
TOKENS = PROMPT[:100]


@pytest.fixture(scope="module")
def plain():
    model = small_llama(**SIZES, max_positions=512)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: 6 * x if x.ndim > 2 else x, state))
    return adapters.decoder(model, model.attention_specs)


@pytest.mark.parametrize("bits", weights.BITS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_weight_has_the_nearest_value_of_its_groups_grid(bits, dtype):
    rng = np.random.default_rng(bits)
    x = rng.standard_t(4, (3, 2, 128)).astype(np.float32) * np.float32(0.02)
    x[0, 0, :64] = 0
    x[1, 1, 5] = 3.0  # an outlier of its group
    codes = weights.quantized("x", jnp.asarray(x, dtype), bits)
    assert sum(y.nbytes for y in jax.tree.leaves(codes)) == x.size * (bits + 0.25) / 8
    step = np.asarray(codes.scale, np.float64).reshape(-1, 1, 1)
    grid = (np.arange(2**bits) - (2**bits - 1) / 2) * step
    groups = np.asarray(jnp.asarray(x, dtype), np.float64).reshape(-1, 64, 1)
    nearest = np.take_along_axis(grid, np.abs(groups - grid).argmin(axis=2, keepdims=True), axis=2)
    got = np.asarray(codes.decoded(), np.float64).reshape(-1, 64, 1)
    rounded = 2.0 ** (-8 if dtype == jnp.bfloat16 else -23) * np.abs(got) + 1e-37
    assert (np.abs(got - groups) <= np.abs(nearest - groups) + rounded).all()
    assert codes.decoded().dtype == dtype


def test_the_scales_are_those_of_least_error():
    """Relative squared errors on Gaussian weights: uniform quantizers have 0.037 and 0.0115 at best
    (Max, IRE Trans. Inf. Theory 6, 1960), with one range for all groups."""
    x = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    found = []
    for bits in weights.BITS:
        got = np.asarray(weights.quantized("x", jnp.asarray(x), bits).decoded())
        found.append(((got - x) ** 2).mean())
    np.testing.assert_array_less(found, [0.037, 0.0115, 0.0036, 1e-4, 1e-8])


def test_rows_and_parts_are_those_of_the_whole():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(10, 2, 64)), jnp.float32)
    for bits in weights.BITS:
        codes = weights.quantized("x", x, bits)
        whole = np.asarray(codes.decoded())
        np.testing.assert_array_equal(
            codes.rows(jnp.array([[7, 0], [7, 9]])), whole[[[7, 0], [7, 9]]]
        )
        np.testing.assert_array_equal(codes.part(jnp.int32(4), 3).decoded(), whole[4:7])


def test_bytes_are_exact_and_what_has_no_groups_stays(plain):
    small = decode.quantize_weights(plain, [3, None, 8], 4)
    saved = sum(CODED * (4 - (bits + 0.25) / 8) for bits in (3, 8))
    saved += VOCAB * 64 * (4 - 4.25 / 8)
    assert small.nbytes == plain.nbytes - saved
    kept = jax.tree.leaves(small.layers[1])
    for x, y in zip(kept, plain.layers[1], strict=True):
        np.testing.assert_array_equal(x, y)


def test_it_decodes_as_the_model_with_its_weights_decoded(plain, monkeypatch):
    """In parts of the vocabulary that do not divide it, by prompts, steps and dense attention."""
    monkeypatch.setattr(weights, "_PART", 16)
    small = decode.quantize_weights(plain, [3, 4, 5], 5)
    same = dataclasses.replace(
        plain, params=weights.decoded(small.params), layers=weights.decoded(small.layers)
    )
    got, want = (dense_log_probs(x, TOKENS, 50) for x in (small, same))
    np.testing.assert_allclose(got, want, atol=2e-5)
    away = float(jnp.abs(want - dense_log_probs(plain, TOKENS, 50)).max())
    assert away > 1e-2  # fewer bits are something else
    budget = [plain.dense_bytes(160) * 2]
    tokens = [decode.generate(x, [TOKENS], budget, max_new_tokens=12) for x in (small, same)]
    np.testing.assert_array_equal(*tokens)


def test_layers_of_one_kind_share_their_programs(plain):
    small = decode.quantize_weights(plain, 4)
    assert len({small.functions(i) for i in range(3)}) == 1
    trees = {jax.tree.structure(x) for x in small.layers}
    assert len(trees) == 1


class Mixed:
    """Functions that look at more of a table than the rows of their tokens."""

    def embed(self, params, tokens, positions):
        return params[0][tokens] - params[0].mean(axis=0)

    def logits(self, params, x):
        return jax.nn.log_softmax(x @ params[0].T)


def test_tables_that_are_looked_at_as_wholes_are_refused(plain, monkeypatch):
    monkeypatch.setattr(weights, "_PART", 16)
    table = (jnp.asarray(np.random.default_rng(0).normal(size=(VOCAB, 64)), jnp.float32),)
    mixed = Mixed()
    odd = dataclasses.replace(plain, params=table, embed=mixed.embed, logits=plain.logits)
    odd = dataclasses.replace(odd, logits=lambda params, x: x @ params[0].T)
    with pytest.raises(ValueError, match=r"table_bits: model\.embed is not the rows"):
        decode.quantize_weights(odd, None, 8)
    odd = dataclasses.replace(
        plain,
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
def test_bad_bits_are_named(plain, given, names):
    with pytest.raises(ValueError, match=names):
        decode.quantize_weights(plain, *given)


def test_models_that_cannot_be_quantized_are_named(plain):
    small = decode.quantize_weights(plain, 4)
    with pytest.raises(ValueError, match=r"model\.layers is quantized already"):
        decode.quantize_weights(small, 4)
    first = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), plain.layers[0])
    with pytest.raises(ValueError, match=r"model\.layers\[0\] has a matrix .* not finite"):
        decode.quantize_weights(dataclasses.replace(plain, layers=(first, *plain.layers[1:])), 4)
