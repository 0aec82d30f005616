"""The error of leaving a tile out, and its sketch, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import importance
from jbalance.attention import Tiling

B, T, S, H, K, D = 2, 70, 90, 4, 2, 8
TILING = Tiling(T, S, 16, 8)
BOTH = pytest.mark.parametrize("method", [importance.tile_error, importance.tile_sketch])


def tokens(seed=0, size=T, keys=S):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, size, H, D)) * 2
    k, v = rng.normal(size=(2, B, keys, K, D))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def weights_and_moments(q, k, v, at, block, causal=True):
    """Of the queries at `at` [N], one example: p [H, N, S]; of each block of keys the attention to it
    [H, N, J], and mean [H, J, D] and variance [H, J] of its values."""
    keys, values = (np.repeat(np.moveaxis(x, 1, 0), H // K, axis=0).astype(float) for x in (k, v))
    logits = np.einsum("nhd,hsd->hns", q[at], keys) / np.sqrt(D)
    if causal:
        seen = np.arange(k.shape[0]) <= at[:, None] + k.shape[0] - q.shape[0]
        logits = np.where(seen, logits, -np.inf)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    starts = range(0, k.shape[0], block)
    mean = np.stack([values[:, s : s + block].mean(axis=1) for s in starts], axis=1)
    mass = np.stack([p[..., s : s + block].sum(axis=-1) for s in starts], axis=-1)
    spread = [
        ((values[:, s : s + block] - mean[:, j, None]) ** 2).sum(axis=-1).mean(axis=-1)
        for j, s in enumerate(starts)
    ]
    return p, mass, mean, np.stack(spread, axis=-1)


def by_definition(q, k, v, at, block, causal=True):
    """Mean over the queries of m² |v̄ - y|² + σ² Σp², over (1 - m)²: [H, J]."""
    p, mass, mean, spread = weights_and_moments(q, k, v, at, block, causal)
    y = np.einsum("hnj,hjd->hnd", mass, mean)
    apart = ((mean[:, None] - y[:, :, None]) ** 2).sum(axis=-1)
    square = np.add.reduceat(p**2, range(0, k.shape[0], block), axis=-1)
    error = mass**2 * apart + spread[:, None] * square
    return (error / np.maximum(1 - mass, 0.05) ** 2).mean(axis=1)


def sketched_by_definition(q, k, v, at, block, causal=True):
    """(|v̄ - ȳ|² + σ²) times the mean over the queries of m² / (1 - m)²: [H, J]."""
    _, mass, mean, spread = weights_and_moments(q, k, v, at, block, causal)
    y = np.einsum("hj,hjd->hd", mass.mean(axis=1), mean)
    apart = ((mean - y[:, None]) ** 2).sum(axis=-1)
    return (mass**2 / np.maximum(1 - mass, 0.05) ** 2).mean(axis=1) * (apart + spread)


def assert_is(got, definition, q, k, v, rows, block, causal):
    assert got.shape == (B, H, -(-q.shape[1] // 16), -(-k.shape[1] // block))
    for i in range(got.shape[2]):
        at = np.minimum(i * 16 + (np.arange(rows) + 1) * 16 // rows - 1, q.shape[1] - 1)
        for b in range(B):
            want = definition(q[b], k[b], v[b], at, block, causal)
            np.testing.assert_allclose(got[b, :, i], want, rtol=5e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "keys", "rows", "causal"), [(T, S, 4, True), (80, 80, 16, True), (T, 40, 1, False)]
)
def test_it_is_the_error_of_its_definition(size, keys, rows, causal):
    q, k, v = tokens(size=size, keys=keys)
    got = importance.tile_error(q, k, v, Tiling(size, keys, 16, 8, causal), rows=rows)
    assert_is(got, by_definition, q, k, v, rows, 8, causal)


@pytest.mark.parametrize(("size", "keys", "causal"), [(T, S, True), (80, 80, True), (T, 40, False)])
def test_the_sketch_is_exact_where_one_key_of_a_group_is_unlike_the_others(size, keys, causal):
    q, k, v = tokens(size=size, keys=keys)
    rng = np.random.default_rng(1)
    for start in range(0, keys, 8):  # alike, but for one key that lies anywhere in the group
        alike = k[:, start : start + 8]
        alike[:] = alike[:, :1]
        alike[:, rng.integers(alike.shape[1])] += 3 * rng.normal(size=(B, K, D))
    got = importance.tile_sketch(q, k, v, Tiling(size, keys, 16, 8, causal), rows=4)
    assert_is(got, sketched_by_definition, q, k, v, 4, 8, causal)


def test_the_sketch_of_groups_of_one_key_is_exact():
    q, k, v = tokens()
    got = importance.tile_sketch(q, k, v, Tiling(T, S, 16, 1), rows=16)
    assert_is(got, sketched_by_definition, q, k, v, 16, 1, True)


def test_the_sketch_expects_what_normal_keys_give():
    # Equal queries and equal values within a block leave the attention to each block to be estimated.
    rng = np.random.default_rng(0)
    heads, blocks, size = 8, 16, 64
    q, v = (np.repeat(rng.normal(size=(1, blocks, heads, 16)), size, axis=1) for _ in range(2))
    scale = rng.uniform(0.2, 1.0, size=(1, blocks, heads, 16)).repeat(size, axis=1)  # of each block
    k = 1 + scale * rng.normal(size=v.shape)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    tiling = Tiling(*(blocks * size,) * 2, size, size, causal=False)
    got, want = (
        np.log(np.asarray(f(q, k, v, tiling))).reshape(-1)
        for f in (importance.tile_sketch, importance.tile_error)
    )
    assert abs(np.mean(got - want)) < 0.1
    assert np.std(got - want) < 0.5 * np.std(want)
    assert np.corrcoef(got, want)[0, 1] > 0.9


@BOTH
def test_a_key_that_some_read_alone_makes_its_tile_count(method):
    # 31 keys of each block alike, one that a query finds: means over the block would not tell.
    q, k, v = (np.zeros((1, 128, 1, D), np.float32) for _ in range(3))
    k[0, 37, 0, 0], q[..., 0] = 3, 20
    v[:] = np.random.default_rng(0).normal(size=v.shape)
    error = np.asarray(method(q, k, v, Tiling(128, 128, 32, 32)))
    assert (error[0, 0, 2:].argmax(axis=-1) == 1).all()


@BOTH
def test_heads_that_spread_their_attention_ask_for_less_than_those_that_read_one_key(method):
    rng = np.random.default_rng(0)
    q, k = np.zeros((1, 64, 2, D), np.float32), np.zeros((1, 64, 2, D), np.float32)
    k[0, 20, 1, 0], q[..., 1, 0] = 1, 20  # head 1 reads key 20, head 0 reads all alike
    v = rng.normal(size=(1, 64, 2, D)).astype(np.float32)
    error = np.asarray(method(q, k, v, Tiling(64, 64, 16, 8), rows=4))
    assert error[0, 1, 3, 2] > 100 * error[0, 0, 3].max()
    assert error[0, 1, 3].argmax() == 2


@BOTH
def test_permuted_heads_give_permuted_errors(method):
    q, k, v = tokens()
    got = method(q, k, v, TILING)
    turned = method(
        np.flip(q.reshape(B, T, K, -1, D), axis=2).reshape(q.shape),
        k[:, :, ::-1],
        v[:, :, ::-1],
        TILING,
    )
    want = np.flip(np.asarray(got).reshape(B, K, -1, *got.shape[2:]), axis=1).reshape(got.shape)
    np.testing.assert_allclose(turned, want, rtol=1e-5, atol=1e-7)


@BOTH
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_computed_in_float32(dtype, method):
    q, k, v = (jnp.asarray(x, dtype) for x in tokens())
    got = method(q, k, v, TILING)
    want = method(*(x.astype(jnp.float32) for x in (q, k, v)), TILING)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@BOTH
def test_logits_of_all_rows_never_exist_at_once(method):
    shape = jax.ShapeDtypeStruct((1, 2048, 4, 16), jnp.float32)

    def error(q, k, v):
        return method(q, k, v, Tiling(2048, 2048, 64, 64))

    memory = jax.jit(error).lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4 * 2048 * 256 * 3  # beside a chunk, q, k and v turned


@BOTH
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"rows": 17}, ("rows is 17", "16")),
        ({"rows": 0}, ("rows is 0",)),
        ({"tiling": Tiling(80, S, 16, 8)}, ("tiling is", "num_queries=80", "70 queries")),
        ({"v": np.zeros((B, S, K, 9), np.float32)}, ("v has shape (2, 90, 2, 9)", "(2, 90, 2, 8)")),
        ({"q": np.zeros((B, T, 3, D), np.float32)}, ("k has shape", "divisor of 3")),
        ({"q": np.zeros((T, H, D), np.float32)}, ("q must have shape [B, T, H, D]",)),
    ],
)
def test_bad_input_is_named(changes, names, method):
    q, k, v = tokens()
    given = {"q": q, "k": k, "v": v, "tiling": TILING} | changes
    with pytest.raises(ValueError, match=r"is|has|must") as error:
        method(**given)
    for name in names:
        assert name in str(error.value)
