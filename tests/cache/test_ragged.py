"""The ragged cache: exact bytes, and attention over what is there equal to masked dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import attention, cache

L, S, K, D, T = 2, 300, 3, 16, 4


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    k, v = (jnp.asarray(rng.normal(size=(L, S, K, D)), jnp.float32) for _ in range(2))
    kept = rng.random((L, K, S)) < rng.random((L, K, 1))
    kept[0, 1] = False  # a unit without entries
    kept[1, 2] = True  # one with all
    return k, v, kept


def masked(q, k, v, kept):
    """Dense attention [T, D] and log-sum-exp [T] of one unit, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k[kept], v[kept]))
    logits = q @ k.T / np.sqrt(D)
    lse = np.log(np.exp(logits).sum(-1))
    return np.exp(logits - lse[:, None]) @ v, lse


@pytest.mark.parametrize("units", [None, [4, 1, 0], [2]])
def test_attention_equals_masked_dense_attention(units):
    k, v, kept = arrays()
    packed = cache.pack(k, v, kept, units, dtype=jnp.float32)
    units = list(range(L * K)) if units is None else units
    q = jnp.asarray(np.random.default_rng(1).normal(size=(len(units), T, D)), jnp.float32)
    out = cache.attend(q, packed, jnp.arange(len(units)))
    for i, unit in enumerate(units):
        layer, head = divmod(unit, K)
        if not kept[layer, head].any():
            np.testing.assert_array_equal(out.y[i], 0)
            assert (out.lse[i] < -1e29).all()
            continue
        y, lse = masked(q[i], k[layer, :, head], v[layer, :, head], kept[layer, head])
        np.testing.assert_allclose(out.y[i], y, atol=1e-5)
        np.testing.assert_allclose(out.lse[i], lse, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 3e-2), (jnp.float16, 3e-3)])
def test_sixteen_bits(dtype, tolerance):
    k, v, kept = arrays()
    q = jnp.ones((L * K, T, D))
    exact = cache.attend(q, cache.pack(k, v, kept, dtype=jnp.float32), jnp.arange(L * K))
    stored = cache.attend(q, cache.pack(k, v, kept, dtype=dtype), jnp.arange(L * K))
    np.testing.assert_allclose(stored.y, exact.y, atol=tolerance)


def test_bytes_are_those_of_the_arrays_and_nothing_is_padded():
    k, v, kept = arrays()
    packed = cache.pack(k, v, kept)
    assert packed.num_entries == kept.sum()
    assert packed.nbytes == sum(x.nbytes for x in jax.tree.leaves(packed))
    assert packed.nbytes == kept.sum() * 2 * D * 2 + cache.table_bytes(L * K)


@pytest.mark.parametrize("budget", [1000, 4096, 4097, 4159, 4160, 10**12])
def test_entries_within_use_the_budget_to_the_last_entry(budget):
    number = cache.entries_within(budget, L * K, D)
    used = number * 2 * D * 2 + cache.table_bytes(L * K)
    assert used <= budget < used + 2 * D * 2


def test_merging_parts_is_attention_over_the_whole():
    k, v, kept = arrays()
    kept[:] = True
    first, second = kept.copy(), kept.copy()
    first[..., S // 3 :] = False
    second[..., : S // 3] = False
    q = jnp.asarray(np.random.default_rng(1).normal(size=(L * K, T, D)), jnp.float32)
    units = jnp.arange(L * K)
    parts = [
        cache.attend(q, cache.pack(k, v, x, dtype=jnp.float32), units) for x in (first, second)
    ]
    whole = cache.attend(q, cache.pack(k, v, kept, dtype=jnp.float32), units)
    merged = attention.merge(*parts)
    np.testing.assert_allclose(merged.y, whole.y, atol=1e-5)
    np.testing.assert_allclose(merged.lse, whole.lse, atol=1e-5)


def test_new_offsets_do_not_recompile_and_only_their_tiles_are_computed():
    traces = 0

    @jax.jit
    def attend(q, held, units):
        nonlocal traces
        traces += 1
        return cache.attend(q, held, units)

    keys = jnp.ones((1024, D))
    q = jnp.ones((2, T, D))
    for cut in (0, 1, 128, 500, 1024):
        held = cache.RaggedCache(keys, keys, jnp.array([0, cut, 1024], jnp.int32))
        y = attend(q, held, jnp.arange(2)).y
        np.testing.assert_allclose(y[0], 1.0 if cut else 0.0, rtol=1e-6)
    assert traces == 1
    # What lies outside a unit's entries is never read into its result, not even as 0 * NaN.
    poisoned = keys.at[600:].set(jnp.nan)
    held = cache.RaggedCache(poisoned, poisoned, jnp.array([0, 512, 512], jnp.int32))
    assert jnp.isfinite(attend(q, held, jnp.arange(2)).y).all()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda k, v, kept: cache.pack(k[0], v, kept), "k must have shape"),
        (lambda k, v, kept: cache.pack(k, v[:, 1:], kept), "v has shape"),
        (lambda k, v, kept: cache.pack(k, v, kept[:, :1]), "kept has shape"),
        (lambda k, v, kept: cache.pack(k, v, kept, [L * K]), "units"),
        (lambda k, v, kept: cache.entries_within(10, 6, D), "budget_bytes is 10"),
        (
            lambda k, v, kept: cache.attend(
                jnp.ones((1, T, D + 1)), cache.pack(k, v, kept), jnp.arange(1)
            ),
            "q has 17 entries",
        ),
        (
            lambda k, v, kept: cache.attend(
                jnp.ones((2, T, D)), cache.pack(k, v, kept), jnp.arange(1)
            ),
            "units has 1 entries",
        ),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=r"must|has|is|units") as error:
        call(*arrays())
    assert names in str(error.value)
