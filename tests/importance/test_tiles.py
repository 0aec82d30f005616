"""The error of leaving a tile out, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import importance

B, T, S, H, K, D = 2, 70, 90, 4, 2, 8
BLOCKS = {"block_q": 16, "block_k": 8}


def tokens(seed=0, size=T, keys=S):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, size, H, D)) * 2
    k, v = rng.normal(size=(2, B, keys, K, D))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def by_definition(q, k, v, at, block, causal=True):
    """m² |v̄ - y|² + σ² Σp², over (1 - m)², and the weights; of the queries at `at` [N], one example."""
    keys, values = (np.repeat(np.moveaxis(x, 1, 0), H // K, axis=0).astype(float) for x in (k, v))
    logits = np.einsum("nhd,hsd->hns", q[at], keys) / np.sqrt(D)
    if causal:
        seen = np.arange(k.shape[0]) <= at[:, None] + k.shape[0] - q.shape[0]
        logits = np.where(seen, logits, -np.inf)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    out = []
    starts = range(0, k.shape[0], block)
    mean = np.stack([values[:, s : s + block].mean(axis=1) for s in starts], axis=1)
    mass = np.stack([p[..., s : s + block].sum(axis=-1) for s in starts], axis=-1)
    y = np.einsum("hnj,hjd->hnd", mass, mean)
    for j, s in enumerate(starts):
        apart = ((mean[:, None, j] - y) ** 2).sum(axis=-1)
        spread = ((values[:, s : s + block] - mean[:, j, None]) ** 2).sum(axis=-1).mean(axis=-1)
        error = mass[..., j] ** 2 * apart + spread[:, None] * (p[..., s : s + block] ** 2).sum(-1)
        out.append(error / np.maximum(1 - mass[..., j], 0.05) ** 2)
    return np.stack(out, axis=-1)


@pytest.mark.parametrize(
    ("size", "keys", "rows", "causal"), [(T, S, 4, True), (80, 80, 16, True), (T, 40, 1, False)]
)
def test_it_is_the_error_of_its_definition(size, keys, rows, causal):
    q, k, v = tokens(size=size, keys=keys)
    got = importance.tile_error(q, k, v, rows=rows, causal=causal, **BLOCKS)
    assert got.shape == (B, H, -(-size // 16), -(-keys // 8))
    for block in range(got.shape[2]):
        at = np.minimum(block * 16 + (np.arange(rows) + 1) * 16 // rows - 1, size - 1)
        for b in range(B):
            want = by_definition(q[b], k[b], v[b], at, 8, causal).mean(axis=1)
            np.testing.assert_allclose(got[b, :, block], want, rtol=2e-4, atol=1e-5)


def test_heads_that_spread_their_attention_ask_for_less_than_those_that_read_one_key():
    rng = np.random.default_rng(0)
    q, k = np.zeros((1, 64, 2, D), np.float32), np.zeros((1, 64, 2, D), np.float32)
    k[0, 20, 1, 0], q[..., 1, 0] = 1, 20  # head 1 reads key 20, head 0 reads all alike
    v = rng.normal(size=(1, 64, 2, D)).astype(np.float32)
    error = np.asarray(importance.tile_error(q, k, v, rows=4, **BLOCKS))
    assert error[0, 1, 3, 2] > 100 * error[0, 0, 3].max()
    assert error[0, 1, 3].argmax() == 2


def test_permuted_heads_give_permuted_errors():
    q, k, v = tokens()
    got = importance.tile_error(q, k, v, **BLOCKS)
    turned = importance.tile_error(
        np.flip(q.reshape(B, T, K, -1, D), axis=2).reshape(q.shape),
        k[:, :, ::-1],
        v[:, :, ::-1],
        **BLOCKS,
    )
    want = np.flip(np.asarray(got).reshape(B, K, -1, *got.shape[2:]), axis=1).reshape(got.shape)
    np.testing.assert_allclose(turned, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_computed_in_float32(dtype):
    q, k, v = (jnp.asarray(x, dtype) for x in tokens())
    got = importance.tile_error(q, k, v, **BLOCKS)
    want = importance.tile_error(*(x.astype(jnp.float32) for x in (q, k, v)), **BLOCKS)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_logits_of_all_rows_never_exist_at_once():
    shape = jax.ShapeDtypeStruct((1, 2048, 4, 16), jnp.float32)

    def error(q, k, v):
        return importance.tile_error(q, k, v, block_q=64, block_k=64)

    memory = jax.jit(error).lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4 * 2048 * 256 * 3  # beside a chunk, q, k and v turned


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"rows": 17}, ("rows is 17", "16")),
        ({"rows": 0}, ("rows is 0",)),
        ({"block_k": 0}, ("block_k is 0",)),
        ({"v": np.zeros((B, S, K, 9), np.float32)}, ("v has shape (2, 90, 2, 9)", "(2, 90, 2, 8)")),
        ({"q": np.zeros((B, T, 3, D), np.float32)}, ("k has shape", "divisor of 3")),
        ({"q": np.zeros((T, H, D), np.float32)}, ("q must have shape [B, T, H, D]",)),
    ],
)
def test_bad_input_is_named(changes, names):
    q, k, v = tokens()
    given = {"q": q, "k": k, "v": v, **BLOCKS} | changes
    with pytest.raises(ValueError, match=r"is|has|must") as error:
        importance.tile_error(**given)
    for name in names:
        assert name in str(error.value)
